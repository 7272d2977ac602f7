"""Independent answers: the definition of a KAN, edge by edge, in plain Python and float64.

Nothing here uses the code under test, torch or vectorised tricks; it is slow and easy to check.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def basis_function(x: float, knots: Array, i: int, order: int) -> float:
    """B[i, order](x) by the Cox-de Boor recursion, straight from its definition."""
    if order == 0:
        return 1.0 if knots[i] <= x < knots[i + 1] else 0.0
    rising = (x - knots[i]) / (knots[i + order] - knots[i])
    falling = (knots[i + order + 1] - x) / (knots[i + order + 1] - knots[i + 1])
    return float(
        rising * basis_function(x, knots, i, order - 1)
        + falling * basis_function(x, knots, i + 1, order - 1)
    )


def silu(x: float) -> float:
    return x / (1.0 + math.exp(-x)) if x > -700 else 0.0


def gelu(x: float) -> float:
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


def kan(state: Mapping[str, Array], rows: Array, activation: Callable[[float], float]) -> Array:
    """Evaluate a network given as the arrays of a state dict.

    Args:
        state: `layers.N.base_weight` and so on, float64.
        rows: Shape (rows, in).
        activation: The base activation.

    Returns:
        Shape (rows, out).
    """
    values = np.asarray(rows, dtype=np.float64)
    depth = 1 + max(int(key.split(".")[1]) for key in state)
    for n in range(depth):
        base, spline, grid = (
            state[f"layers.{n}.{name}"] for name in ("base_weight", "spline_weight", "grid")
        )
        scaler = state.get(f"layers.{n}.spline_scaler", np.ones_like(base))
        count = spline.shape[2]
        order = grid.shape[1] - count - 1
        result = np.zeros((len(values), base.shape[0]))
        for row, x in enumerate(values):
            for i in range(base.shape[1]):
                basis = [basis_function(x[i], grid[i], c, order) for c in range(count)]
                for o in range(base.shape[0]):
                    curve = float(np.dot(spline[o, i], basis))
                    result[row, o] += base[o, i] * activation(x[i]) + scaler[o, i] * curve
        values = result
    return values
