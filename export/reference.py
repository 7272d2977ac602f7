"""What a float32 runtime should answer at the probes, and how far from it is still right.

The oracle is the network itself in float64, which for a KAN is the Cox-de Boor recursion on the
checkpoint's own numbers. An output may be off by `RELATIVE_TOLERANCE * max(s, |y64|)`, where s is
the size of that output at ordinary inputs, at most 1; or, where the untouched eager model in
float32 is itself further away, by `EAGER_FACTOR` times what eager is off.

Eager's error at one output is a single draw of rounding noise. So its size is taken from batches of
every size and the whole group of probes, relative to the noise that each output must be expected to
hold: an output that is a small difference of large terms is noisy in any float32 runtime, eager
included. For a KAN that is found from the magnitudes that are added up to give each output, carried
through the layers (`_rounding_scale`); for any other network by moving all its weights a little
(`_sensitivity`).
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from export.errors import NetworkError
from export.network import Call, Network, is_single
from export.probes import ORDINARY, Probes, make_kan_probes, make_probes
from kan_bundle.golden import side_by_side
from kan_model import KAN, KANLinear
from kan_model.splines import b_spline_basis, b_spline_slope

RELATIVE_TOLERANCE = 1e-5
EAGER_FACTOR = 2.0
BATCH_SIZES = (1, 2, 7, 64)
_LARGEST = 1e37  # of the terms of a sum; float32 ends at 3.4e38
_NOISE = 2.0**-26  # below half a unit in the last place of float32, wherever in its binade
_BUDGET = 2**21  # numbers that the probes of a network may hold, on its larger side


@dataclass(frozen=True)
class Reference:
    """Right answers. The outputs of a row are flattened and side by side.

    Attributes:
        probes: The inputs.
        outputs: Answers in float64, shape (rows, numbers).
        eager: The eager float32 model's answers in batches of each of `BATCH_SIZES`, shape
            (batch sizes, rows, numbers).
        tolerance: Largest allowed |y - outputs|, shape (rows, numbers).
        precision: Of `outputs`: float64, or float32 if the network cannot run in float64.
    """

    probes: Probes
    outputs: NDArray[np.float64]
    eager: NDArray[np.float64]
    tolerance: NDArray[np.float64]
    precision: Literal["float64", "float32"] = "float64"

    def take(self, rows: NDArray[np.bool_]) -> "Reference":
        """Keep some rows."""
        return replace(
            self,
            probes=self.probes.take(rows),
            outputs=self.outputs[rows],
            eager=self.eager[:, rows],
            tolerance=self.tolerance[rows],
        )


def make_reference(network: Network) -> Reference:
    """Compute the answers and tolerances for a network.

    Args:
        network: It is as it was when this returns.

    Raises:
        NetworkError: It answers no ordinary input with a number.
    """
    probes = _choose_probes(network)
    eager = np.stack([evaluate(network.call, probes, size) for size in BATCH_SIZES])
    kan = network.kan
    if kan is None:
        return _reference_of_network(network, probes, eager)
    exact = is_single(kan)
    oracle = copy.deepcopy(kan).double()
    inputs = probes.inputs[0].astype(np.float32)
    scale = _rounding_scale(oracle, inputs, exact)
    in_range = (scale <= _LARGEST).all(axis=1) | np.isnan(inputs).any(axis=1)
    keep: NDArray[np.bool_] = in_range & _decidable(oracle, inputs, exact)
    probes, scale, eager = probes.take(keep), scale[keep], eager[:, keep]
    outputs = evaluate(Call(oracle, ["x"]), probes, BATCH_SIZES[-1], torch.float64)
    tolerance = _tolerance(probes.groups, outputs, eager, scale, _longest_sum(kan))
    return Reference(probes, outputs, eager, tolerance)


def evaluate(
    call: Call, probes: Probes, batch_size: int, dtype: torch.dtype = torch.float32
) -> NDArray[np.float64]:
    """Run a network a batch at a time, which bounds the memory it takes.

    Args:
        call: The network.
        probes: Its inputs.
        batch_size: Rows a run.
        dtype: What floating-point inputs are given as.

    Returns:
        Shape (rows, numbers).
    """
    found = []
    with torch.no_grad():
        for start in range(0, len(probes), batch_size):
            rows = [torch.from_numpy(a[start : start + batch_size]) for a in probes.inputs]
            given = [row.to(dtype) if row.is_floating_point() else row for row in rows]
            found.append(side_by_side([y.double().numpy() for y in call(*given)]))
    return np.concatenate(found)


def _choose_probes(network: Network) -> Probes:
    """Make the probes of the first layer, if the inputs reach it, and those of any network."""
    probes = make_probes(network.inputs)
    if network.leading is not None:
        layer = network.layers[network.leading]
        at_knots = make_kan_probes(layer.grid.numpy(), layer.spline_order)
        shape = network.inputs.specs[0].shape
        at_knots = Probes((at_knots.inputs[0].reshape(shape),), at_knots.groups)
        given = probes.take(probes.groups == "samples")
        probes = given.join(at_knots) if network.kan else probes.join(at_knots)
    sizes = [
        sum(math.prod(spec.shape[1:]) for spec in specs)
        for specs in (network.inputs.specs, network.outputs)
    ]
    most = max(1, _BUDGET // max(sizes) // len(np.unique(probes.groups)))
    probes = probes.take(probes.evenly(most))
    finite = np.ones(len(probes), dtype=bool)
    for array in probes.inputs:
        finite &= np.isfinite(array).reshape(len(array), -1).all(axis=1)
    # Some networks refuse NaN; what they are exported to has no such guard.
    nan = probes.take(~finite)
    if len(nan):
        try:
            evaluate(network.call, nan, BATCH_SIZES[-1])
        except Exception:
            return probes.take(finite)
    return probes


def _reference_of_network(
    network: Network, probes: Probes, eager: NDArray[np.float64]
) -> Reference:
    """Compare with the network in float64; with itself in float32 if it has no float64 form."""
    precision: Literal["float64", "float32"] = "float64"
    try:
        with _in_double(network.exact) as call:
            # Few rows at a time: a double of a large network leaves little room.
            outputs = evaluate(call, probes, BATCH_SIZES[1], torch.float64)
            moved = _sensitivity(call, probes, outputs)
    except Exception:  # some module insists on float32
        precision, outputs, moved = "float32", eager[-1], np.zeros_like(eager[-1])
    lost = np.isfinite(outputs) & ~np.isfinite(eager).all(axis=0)
    kept: NDArray[np.bool_] = np.logical_not(lost.any(axis=1))
    probes, outputs, eager, moved = probes.take(kept), outputs[kept], eager[:, kept], moved[kept]
    if not np.isfinite(outputs[np.isin(probes.groups, ORDINARY)]).any():
        raise NetworkError(
            "the network answers every ordinary input with NaN or infinity, so nothing can be "
            "compared; give rows of real data with --samples"
        )
    # One draw of a sensitivity says little: rows of a group share the root of the mean square.
    scale = np.empty_like(moved)
    for group in np.unique(probes.groups):
        rows = probes.groups == group
        squares = np.where(np.isfinite(moved[rows]), moved[rows], 0.0) ** 2
        scale[rows] = np.sqrt(squares.mean(axis=0))
    tolerance = _tolerance(probes.groups, outputs, eager, scale, None)
    return Reference(probes, outputs, eager, tolerance, precision)


def _sensitivity(call: Call, probes: Probes, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find how far each output moves when every weight moves by about a rounding of float32.

    This is stochastic arithmetic at the weights, after J. Vignes, A stochastic arithmetic for
    reliable scientific computation (1993), with noise in float64.

    Args:
        call: In float64, with float32's values. The noise is too small to change what they are
            rounded to.
        probes: Shape (rows, ...).
        outputs: What the network gives without noise, shape (rows, numbers).

    Returns:
        Shape (rows, numbers).
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*call.parameters(), *call.buffers()):
            if not tensor.is_floating_point():
                continue
            rows = tensor if tensor.dim() else tensor.unsqueeze(0)
            for part in rows.split(max(1, 2**22 // max(1, rows[0].numel()))):  # never a whole copy
                noise = torch.rand(part.shape, generator=generator, dtype=part.dtype)
                part.mul_(1 + _NOISE * (2 * noise - 1))
    moved = evaluate(call, probes, BATCH_SIZES[1], torch.float64)
    with np.errstate(invalid="ignore"):
        distance: NDArray[np.float64] = np.abs(moved - outputs)
    return distance


@contextmanager
def _in_double(call: Call) -> Iterator[Call]:
    """Hold a network in float64: in place if going back restores it to the bit, else a copy."""
    default = torch.get_default_dtype()
    single = is_single(call)
    double = call if single else copy.deepcopy(call)
    torch.set_default_dtype(torch.float64)  # for what its forward makes anew
    try:
        yield double.double()
    finally:
        torch.set_default_dtype(default)
        if single:
            call.float()


def largest(values: NDArray[np.float64]) -> float:
    """Take the largest value that is a number; NaN marks a pair of NaNs, which agree."""
    numbers = values[~np.isnan(values)]
    return float(numbers.max()) if numbers.size else 0.0


def _tolerance(
    groups: NDArray[np.str_],
    outputs: NDArray[np.float64],
    eager: NDArray[np.float64],
    scale: NDArray[np.float64],
    longest_sum: int | None,
) -> NDArray[np.float64]:
    """Apply the rule at the top of this module.

    Args:
        groups: Shape (rows,).
        outputs: float64 answers, shape (rows, out).
        eager: The float32 model's, shape (batch sizes, rows, out).
        scale: Noise to be expected, in any unit, shape (rows, out).
        longest_sum: Number of terms, if the unit of `scale` is their magnitude.

    Returns:
        Shape (rows, out).
    """
    fixed = _fixed_tolerance(groups, outputs)
    # Where eager itself is NaN or infinite it must not widen what is allowed: it fails instead.
    with np.errstate(invalid="ignore", divide="ignore"):
        eager_error = np.where(np.isfinite(eager), np.abs(eager - outputs), 0.0).max(axis=0)
        noise = np.where(scale > 0, eager_error / scale, 0.0)
    # No sum of n terms is off by more than n roundings; what is, was not rounding.
    rounding_bound = np.inf if longest_sum is None else longest_sum * np.finfo(np.float32).eps
    noise_of = {g: min(rounding_bound, largest(noise[groups == g])) for g in np.unique(groups)}
    per_row = np.array([noise_of[group] for group in groups])[:, None]
    from_eager = EAGER_FACTOR * np.maximum(eager_error, per_row * scale)
    allowed: NDArray[np.float64] = np.maximum(fixed, from_eager)
    return allowed


def _fixed_tolerance(groups: NDArray[np.str_], outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Allow `RELATIVE_TOLERANCE` of an output's size; shape (rows, numbers)."""
    ordinary = np.abs(outputs[np.isin(groups, ORDINARY)])
    ordinary = np.where(np.isfinite(ordinary), ordinary, 0.0)
    size = np.minimum(1.0, ordinary.max(axis=0, initial=0.0))  # (numbers,)
    fixed: NDArray[np.float64] = RELATIVE_TOLERANCE * np.maximum(size, np.abs(outputs))
    return fixed


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
