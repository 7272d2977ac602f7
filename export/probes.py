"""Inputs that matter for splines.

Random points alone hide errors: what goes wrong in a spline goes wrong at a knot, in the last bit
beside it, past the grid where the basis fades, or far away where only the base path is left. Each
group here goes to one of those places, in every feature at once and in every feature by itself.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ON_THE_GRID = ("knots", "inside", "margin")
"""Groups of probes within the outermost knots, where the splines are not zero."""

_RANDOM_ROWS = 64
_LONE_ROWS = 16
_FAR = (1.0, 10.0, 1e3, 1e6)  # distance from the outermost knot, in widths of the grid


@dataclass(frozen=True)
class Probes:
    """Inputs and where they lie.

    Attributes:
        inputs: float32, shape (rows, in).
        groups: Name of each row's group, shape (rows,).
    """

    inputs: NDArray[np.float32]
    groups: NDArray[np.str_]


def make_probes(knots: NDArray[np.float32], order: int, seed: int = 0) -> Probes:
    """Make the probes for a network whose first layer has these knots.

    Groups: `knots` (every knot and its float32 neighbours on either side), `inside` the grid,
    `margin` (between the grid's ends and the outermost knots), `outside` those, and `nan` (one
    feature is NaN, or all).

    Args:
        knots: Knots of the first layer, shape (in, G + 2k + 1).
        order: k, the spline order.
        seed: Of the random choices.

    Returns:
        Probes for `in` features.
    """
    rng = np.random.default_rng(seed)
    features, count = knots.shape
    first, last = knots[:, 0], knots[:, -1]
    low, high = knots[:, order], knots[:, count - 1 - order]
    width = (last - first).astype(np.float64)

    def uniform(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
        return rng.uniform(a, b, (_RANDOM_ROWS, features))

    beside = np.stack(
        [np.nextafter(knots, np.float32(-np.inf)), knots, np.nextafter(knots, np.float32(np.inf))]
    )  # (3, in, K)
    together = beside.transpose(0, 2, 1).reshape(-1, features)  # every feature at its j-th knot
    column = np.arange(features)
    mixed = beside[
        rng.integers(3, size=(_RANDOM_ROWS, features)),
        column,
        rng.integers(count, size=(_RANDOM_ROWS, features)),
    ]  # every feature at a knot of its own

    inside = uniform(low, high)
    left, right = uniform(first, low), uniform(high, last)
    margin = np.where(rng.random(left.shape) < 0.5, left, right)

    distance = rng.choice(_FAR, (_RANDOM_ROWS, features)) * width
    away = np.where(rng.random(distance.shape) < 0.5, first - distance, last + distance)
    lone = uniform(low, high)[:_LONE_ROWS]  # one feature outside, the others inside
    strays = rng.integers(features, size=_LONE_ROWS)
    lone[np.arange(_LONE_ROWS), strays] = away[:_LONE_ROWS][np.arange(_LONE_ROWS), strays]

    nan = uniform(low, high)[: _LONE_ROWS + 1]
    nan[np.arange(_LONE_ROWS), rng.integers(features, size=_LONE_ROWS)] = np.nan
    nan[_LONE_ROWS] = np.nan

    groups = {
        "knots": np.concatenate([together, mixed]),
        "inside": inside,
        "margin": margin,
        "outside": np.concatenate([away, lone]),
        "nan": nan,
    }
    limit = float(np.finfo(np.float32).max)
    inputs = np.clip(np.concatenate(list(groups.values())), -limit, limit)  # NaN stays NaN
    return Probes(
        inputs=inputs.astype(np.float32),
        groups=np.repeat(list(groups), [len(rows) for rows in groups.values()]),
    )
