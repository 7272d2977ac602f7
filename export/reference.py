"""What a float32 runtime should answer at the probes, and how far from it is still right.

The oracle is the Cox-de Boor recursion in float64, on the checkpoint's own numbers. An output may
be off by `RELATIVE_TOLERANCE * max(s, |y64|)`, where s is the size of that output on the grid, at
most 1; or, where the untouched eager model in float32 is itself further away, by
`EAGER_FACTOR` times what eager is off.

Eager's error at one output is a single draw of rounding noise. So its size is taken from batches of
every size and the whole group of probes, relative to the noise that each output must be expected
to hold: the magnitudes that are added up to give it, carried through the layers
(`_rounding_scale`). An output that is a small difference of large terms is noisy in any float32
runtime, eager included.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from export.probes import ON_THE_GRID, Probes, make_probes
from kan_model import KAN, KANLinear
from kan_model.splines import b_spline_basis, b_spline_slope

RELATIVE_TOLERANCE = 1e-5
EAGER_FACTOR = 2.0
BATCH_SIZES = (1, 2, 7, 64)
_LARGEST = 1e37  # of the terms of a sum; float32 ends at 3.4e38


@dataclass(frozen=True)
class Reference:
    """Right answers.

    Attributes:
        probes: The inputs.
        outputs: float64 answers, shape (rows, out).
        eager: The eager float32 model's answers in batches of each of `BATCH_SIZES`, shape
            (batch sizes, rows, out).
        tolerance: Largest allowed |y - outputs|, shape (rows, out).
    """

    probes: Probes
    outputs: NDArray[np.float64]
    eager: NDArray[np.float64]
    tolerance: NDArray[np.float64]


def make_reference(network: KAN) -> Reference:
    """Compute the answers and tolerances for a network.

    Args:
        network: As loaded, in the checkpoint's precision. It is not changed.
    """
    first = network.layers[0]
    exact = first.grid.dtype == torch.float32
    oracle = copy.deepcopy(network).double()
    probes = make_probes(first.grid.float().numpy(), first.spline_order)
    scale = _rounding_scale(oracle, probes.inputs, exact)

    in_range = (scale <= _LARGEST).all(axis=1) | np.isnan(probes.inputs).any(axis=1)
    keep = in_range & _decidable(oracle, probes.inputs, exact)
    probes, scale = Probes(probes.inputs[keep], probes.groups[keep]), scale[keep]
    outputs = evaluate(oracle, probes.inputs)
    single = copy.deepcopy(network).float()
    eager = np.stack([evaluate(single, probes.inputs, size) for size in BATCH_SIZES])
    tolerance = _tolerance(probes.groups, outputs, eager, scale, _longest_sum(network))
    return Reference(probes, outputs, eager, tolerance)


def evaluate(
    network: KAN, inputs: NDArray[np.float32], batch_size: int = BATCH_SIZES[-1]
) -> NDArray[np.float64]:
    """Run a network in its own precision, a batch at a time, which bounds the memory it takes."""
    dtype = network.layers[0].grid.dtype
    chunks = torch.split(torch.from_numpy(inputs).to(dtype), batch_size)
    with torch.no_grad():
        return torch.cat([network(chunk).double() for chunk in chunks]).numpy()


def largest(values: NDArray[np.float64]) -> float:
    """Take the largest value that is a number; NaN marks a pair of NaNs, which agree."""
    numbers = values[~np.isnan(values)]
    return float(numbers.max()) if numbers.size else 0.0


def _tolerance(
    groups: NDArray[np.str_],
    outputs: NDArray[np.float64],
    eager: NDArray[np.float64],
    scale: NDArray[np.float64],
    longest_sum: int,
) -> NDArray[np.float64]:
    """Apply the rule at the top of this module.

    Args:
        groups: Shape (rows,).
        outputs: float64 answers, shape (rows, out).
        eager: The float32 model's, shape (batch sizes, rows, out).
        scale: From `_rounding_scale`, shape (rows, out).
        longest_sum: Number of terms.

    Returns:
        Shape (rows, out).
    """
    on_grid = np.abs(outputs[np.isin(groups, ON_THE_GRID)])
    size = np.minimum(1.0, on_grid.max(axis=0, initial=0.0))  # (out,)
    fixed = RELATIVE_TOLERANCE * np.maximum(size, np.abs(outputs))

    # Where eager itself is NaN or infinite it must not widen what is allowed: it fails instead.
    eager_error = np.where(np.isfinite(eager), np.abs(eager - outputs), 0.0).max(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        noise = np.where(scale > 0, eager_error / scale, 0.0)
    # No sum of n terms is off by more than n roundings; what is, was not rounding.
    rounding_bound = longest_sum * np.finfo(np.float32).eps
    noise_of = {g: min(rounding_bound, largest(noise[groups == g])) for g in np.unique(groups)}
    per_row = np.array([noise_of[group] for group in groups])[:, None]
    from_eager = EAGER_FACTOR * np.maximum(eager_error, per_row * scale)
    allowed: NDArray[np.float64] = np.maximum(fixed, from_eager)
    return allowed


def _rounding_scale(oracle: KAN, inputs: NDArray[np.float32], exact: bool) -> NDArray[np.float64]:
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
        for value in torch.split(torch.from_numpy(inputs).double(), BATCH_SIZES[-1]):
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


def _decidable(oracle: KAN, inputs: NDArray[np.float32], exact: bool) -> NDArray[np.bool_]:
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
                slack = RELATIVE_TOLERANCE * value.abs().clamp_min(1.0)
                keep &= ~(distance <= slack).any(dim=-1).numpy()
            value = layer(value)
    return keep


def _longest_sum(network: KAN) -> int:
    """Count the terms of the longest sum on any way through the network."""
    return sum(
        layer.in_features * (layer.grid_size + layer.spline_order + 1) for layer in network.layers
    )
