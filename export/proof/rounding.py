"""How noisy float32 must be expected to be at each output of a network.

An output that is a small difference of large terms is noisy in any float32 runtime, eager included.
Nothing here knows what a runtime answered.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from export.proof.eager import LARGEST_BATCH
from kan_model import KAN, KANLinear
from kan_model.splines import b_spline_basis, b_spline_slope

_SLACK = 1e-5  # share of a value within which float32 may find it on either side of a step
ROUNDING = 2.0**-24
"""The unit roundoff of float32."""
_DRAWS = 2
_ACTIVATIONS = (
    *("elu", "erf", "expm1", "gelu", "hardswish", "log1p", "log_sigmoid_forward", "mish"),
    *("sigmoid", "silu", "softplus", "tanh"),
)
_FLAT = 16.0  # beyond it they are flat or straight in float32
_WEIGHTS = 2**24  # numbers; what is larger is made of weights, which have noise already
_POOL = 1_048_573  # random numbers, a prime so that no stride of a tensor meets the same ones


def rounding_scale(oracle: KAN, inputs: NDArray[np.float32], exact: bool) -> NDArray[np.float64]:
    """Sum, for each output, the magnitudes whose rounding it holds.

    To first order a float32 result is off by a small multiple of the unit roundoff times this: the
    magnitudes of the terms its last layer adds up, and, through the slopes of that layer, the same
    of the layers before. See N. Higham, Accuracy and Stability of Numerical Algorithms, section
    3.3, running error analysis.

    Args:
        oracle: In float64.
        inputs: Shape (rows, in).
        exact: Whether float32 holds the checkpoint's knots as they are. The inputs it does hold;
            knots that are rounded shift a spline as rounding its input would.

    Returns:
        Shape (rows, out), in the units of the output.
    """
    parts = []
    with torch.no_grad():
        for value in torch.split(torch.from_numpy(inputs).double(), LARGEST_BATCH):
            scale = torch.zeros_like(value) if exact else value.abs()
            for layer in oracle.layers:
                scale, value = _layer_rounding_scale(layer, value, scale), layer(value)
            parts.append(scale)
    return torch.cat(parts).numpy()


def _layer_rounding_scale(layer: KANLinear, value: Tensor, scale: Tensor) -> Tensor:
    """Carry the scale of the rounding in a layer's inputs, (rows, in), to its outputs."""
    basis = b_spline_basis(value, layer.grid, layer.spline_order)  # (rows, in, n)
    basis_slope = b_spline_slope(value, layer.grid, layer.spline_order)
    base, base_slope = _activation_and_slope(layer, value)  # (rows, in)
    of_base = base.abs() + base_slope.abs() * scale + _activation_rounding(layer, value)
    of_spline = basis.abs() + basis_slope.abs() * scale.unsqueeze(-1)
    return linear(of_base, layer.base_weight.abs()) + linear(
        of_spline.flatten(-2), layer.scaled_spline_weight.abs().flatten(1)
    )


def _activation_and_slope(layer: KANLinear, value: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = value.clone().requires_grad_()
        base = layer.base_activation(leaf)
        if not base.requires_grad:  # a staircase has no slope
            return base, torch.zeros_like(base)
        (slope,) = torch.autograd.grad(base.sum(), leaf, materialize_grads=True)
    return base.detach(), slope


def _activation_rounding(layer: KANLinear, value: Tensor) -> Tensor:
    """Measure what eager's float32 activation is off near each value, in unit roundoffs.

    An activation is a formula with roundings of its own: GELU's 1 + erf(x) cancels for negative x,
    so there it is off by much more than a roundoff of its value.
    """
    single = copy.deepcopy(layer.base_activation).float()
    steps = 1 + torch.arange(-4, 5, dtype=torch.float64) * 2.0**-20
    near = (value.unsqueeze(-1) * steps).float()  # (rows, in, 9), and exact in float32
    off: Tensor = (single(near).double() - layer.base_activation(near.double())).abs()
    return off.amax(dim=-1) / (torch.finfo(torch.float32).eps / 2)


def decidable(oracle: KAN, inputs: NDArray[np.float32], exact: bool) -> NDArray[np.bool_]:
    """Tell which probes every float32 model must answer alike, shape (rows,).

    A spline of order 0 is a staircase. Where the value that reaches a layer lies on a step, within
    what float32 can tell, no float32 model, eager included, is bound to either side. Inputs are
    exact, and so is the first layer's side of a step, if float32 holds its knots.
    """
    keep = np.ones(len(inputs), dtype=bool)
    with torch.no_grad():
        value = torch.from_numpy(inputs).double()
        for i, layer in enumerate(oracle.layers):
            if layer.spline_order == 0 and not (i == 0 and exact):
                distance = (value.unsqueeze(-1) - layer.grid).abs().amin(dim=-1)  # (rows, in)
                slack = _SLACK * value.abs().clamp_min(1.0)
                keep &= ~(distance <= slack).any(dim=-1).numpy()
            value = layer(value)
    return keep


def longest_sum(network: KAN) -> int:
    """Count the terms of the longest sum on any way through the network."""
    return sum(
        layer.in_features * (layer.grid_size + layer.spline_order + 1) for layer in network.layers
    )


def sensitivity(
    call: nn.Module,
    inputs: tuple[NDArray[np.generic], ...],
    evaluate: Callable[[tuple[NDArray[np.generic], ...]], NDArray[np.float64]],
    outputs: NDArray[np.float64],
    noise: float,
) -> NDArray[np.float64]:
    """Find how far each output moves when everything moves by about a rounding of float32.

    Noise is added to inputs, weights, and what every operation gives. This is stochastic
    arithmetic, after J. Vignes, A stochastic arithmetic for reliable scientific
    computation (1993), with the noise of float32 in float64.

    Args:
        call: Its weights are changed. With float32's values in float64 and noise below 2^-25 they
            are still rounded to what they were.
        inputs: Shape (rows, ...).
        evaluate: Runs `call`.
        outputs: What the network gives without noise, shape (rows, numbers).
        noise: Largest relative change.

    Returns:
        Root mean square of the moves, scaled to noise of one rounding, shape (rows, numbers).
    """
    factors = _Factors(noise)
    squares = np.zeros_like(outputs)
    for _ in range(_DRAWS):
        with torch.no_grad():
            for tensor in (*call.parameters(), *call.buffers()):
                if tensor.is_floating_point():
                    rows = tensor if tensor.dim() else tensor.unsqueeze(0)
                    size = max(1, 2**22 // max(1, rows[0].numel()))
                    for part in rows.split(size):  # in place, and never a copy of the whole
                        part.mul_(factors(part.shape).to(part.dtype))
            noisy = [
                array * factors(torch.Size(array.shape)).numpy()
                if array.dtype.kind == "f"
                else array
                for array in inputs
            ]
            with _Noise(factors):
                moved = evaluate(tuple(noisy))
        with np.errstate(invalid="ignore", over="ignore"):
            squares += (ROUNDING / noise * (moved - outputs)) ** 2
    scale: NDArray[np.float64] = np.sqrt(squares / _DRAWS)
    return np.where(np.isfinite(scale), scale, 0.0)


class _Factors:
    """Random factors near 1 by the million, taken from a pool at random places.

    To draw every one anew takes several times as long as a network's own operations.

    Args:
        noise: Largest distance from 1; they are uniform.
    """

    def __init__(self, noise: float) -> None:
        self._generator = torch.Generator().manual_seed(0)
        pool = torch.rand(_POOL, generator=self._generator, dtype=torch.float64)
        self._pool = 1 + noise * (2 * pool - 1)

    def __call__(self, shape: torch.Size) -> Tensor:
        """Take factors for a tensor of a shape."""
        left = shape.numel()
        start = int(torch.randint(_POOL, (1,), generator=self._generator))
        parts = [self._pool[start : start + left]]
        while (left := left - len(parts[-1])) > 0:
            parts.append(self._pool[:left])
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)


class _Noise(TorchDispatchMode):
    """Adds noise to what every operation gives.

    Relative to the result; but activations are off relative to their input if that is larger,
    because of what they compute on the way: 1 + erf(x) cancels, exp(x) - 1 does.
    """

    def __init__(self, factors: Callable[[torch.Size], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._factors = factors

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation."""
        found = func(*args, **(kwargs or {}))
        if any(result.alias_info for result in func._schema.returns):  # a view, or in place
            return found
        given = [value for value in args if isinstance(value, Tensor)]

        def add(result: Tensor) -> Tensor:
            if result.is_nested or not result.is_floating_point() or result.numel() > _WEIGHTS:
                return result
            factor = self._factors(result.shape).to(result.dtype)
            noisy = result * factor  # an infinity stays one
            if func.overloadpacket.__name__ in _ACTIVATIONS and given[0].shape == result.shape:
                size = given[0].abs().clamp_max(_FLAT)
                noisy = torch.where(size > result.abs(), result + size * (factor - 1), noisy)
            return noisy

        return tree_map_only(Tensor, add, found)
