"""Proof that the files as written compute what the checkpoint computes.

The oracle is the Cox-de Boor recursion in float64, on the checkpoint's own numbers. A float32
runtime may be off by `RELATIVE_TOLERANCE * max(1, |y64|)`, or, where the untouched eager model
in float32 is itself further away, by `EAGER_FACTOR` times what eager is off.

Eager's error at one output is a single draw of rounding noise, so its size is taken from the whole
group of probes, relative to how much noise each output must be expected to hold: the sum of the
magnitudes that were added up to give it, carried through the layers (`_rounding_scale`). An output
that is a small difference of large terms is noisy in any float32 runtime, eager included.

`measure` measures and `Measurement.passed` judges; nothing here prints, or stops an export.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from export.probes import Probes, make_probes
from kan_bundle.golden import Golden, excess
from kan_model import KAN, KANLinear
from kan_model.splines import b_spline_basis, b_spline_slope

RELATIVE_TOLERANCE = 1e-5
EAGER_FACTOR = 2.0
BATCH_SIZES = (1, 2, 7, 64)
_GOLDEN_ROWS_PER_GROUP = 8
_CHUNK_ROWS = 64  # evaluated at a time; bounds the memory of wide layers

Runner = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Reference:
    """What the outputs should be at the probes, and how far from it is still right.

    Attributes:
        probes: The inputs.
        outputs: float64 answers, shape (rows, out).
        eager: The eager float32 model's answers, shape (rows, out).
        tolerance: Largest allowed |y - outputs|, shape (rows, out).
    """

    probes: Probes
    outputs: NDArray[np.float64]
    eager: NDArray[np.float32]
    tolerance: NDArray[np.float64]


@dataclass(frozen=True)
class Worst:
    """The probe at which a runtime was furthest off, measured in what is allowed there."""

    group: str
    batch_size: int
    row: int
    output: int
    expected: float
    found: float
    allowed: float


@dataclass(frozen=True)
class Measurement:
    """How far one runtime is from the reference.

    Attributes:
        runtime: What ran.
        max_absolute: Largest |y - y64|.
        max_relative: Largest |y - y64| / max(1, |y64|).
        max_ulp: Largest |y - y64| in float32 units in the last place of y64.
        max_from_eager: Largest |y - eager|.
        rows: Input rows compared.
        excess: Largest deviation as a multiple of what was allowed there; infinite where one
            side is NaN and the other is not.
        worst: Where that was.
    """

    runtime: str
    max_absolute: float
    max_relative: float
    max_ulp: float
    max_from_eager: float
    rows: int
    excess: float
    worst: Worst

    @property
    def passed(self) -> bool:
        """Whether every output at every probe was as close as it must be."""
        return self.excess <= 1.0


def make_reference(network: KAN) -> Reference:
    """Compute the answers and tolerances for a network.

    Args:
        network: As loaded, in the checkpoint's precision. It is not changed.
    """
    first = network.layers[0]
    probes = make_probes(first.grid.float().numpy(), first.spline_order)
    probes = _without_undecidable(network, probes)
    outputs = _evaluate(network, torch.float64, probes.inputs)
    eager = _evaluate(network, torch.float32, probes.inputs).astype(np.float32)

    tolerance = _tolerance(network, probes, outputs, eager)
    return Reference(probes, outputs, eager, tolerance)


def measure(runtime: str, run: Runner, reference: Reference) -> Measurement:
    """Run every probe in batches of each of `BATCH_SIZES` and compare.

    Args:
        runtime: Name for the record.
        run: Takes (batch, in), gives (batch, out).
        reference: From `make_reference`.
    """
    expected = reference.outputs
    unit = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    found = np.stack([_run_in_batches(run, reference.probes.inputs, b) for b in BATCH_SIZES])
    off = np.abs(found - expected)  # (batch sizes, rows, out), NaN where both are NaN
    ratio = np.stack([excess(f, expected, reference.tolerance) for f in found])
    size, row, output = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    return Measurement(
        runtime=runtime,
        max_absolute=_largest(off),
        max_relative=_largest(off / np.maximum(1.0, np.abs(expected))),
        max_ulp=_largest(off / unit),
        max_from_eager=_largest(np.abs(found - reference.eager)),
        rows=found.shape[0] * found.shape[1],
        excess=float(ratio.max()),
        worst=Worst(
            group=str(reference.probes.groups[row]),
            batch_size=BATCH_SIZES[size],
            row=int(row),
            output=int(output),
            expected=float(expected[row, output]),
            found=float(found[size, row, output]),
            allowed=float(reference.tolerance[row, output]),
        ),
    )


def eager_runner(network: KAN) -> Runner:
    """Run the untouched model in float32, to be measured like any runtime."""
    return lambda x: _evaluate(network, torch.float32, x).astype(np.float32)


def choose_golden(reference: Reference) -> Golden:
    """Pick probes of every group, evenly spread, for the server to replay."""
    rows = np.concatenate(
        [
            members[np.linspace(0, len(members) - 1, _GOLDEN_ROWS_PER_GROUP).astype(int)]
            for group in np.unique(reference.probes.groups)
            if len(members := np.flatnonzero(reference.probes.groups == group))
        ]
    )
    return Golden(
        inputs=reference.probes.inputs[rows],
        outputs=reference.outputs[rows],
        tolerance=reference.tolerance[rows],
    )


def _tolerance(
    network: KAN, probes: Probes, outputs: NDArray[np.float64], eager: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Say how far from the reference is still right, per output, shape (rows, out)."""
    # Where eager itself is NaN or infinite it must not widen what is allowed: it fails instead.
    eager_error = np.where(np.isfinite(eager), np.abs(eager - outputs), 0.0)
    scale = _rounding_scale(network, probes.inputs)
    with np.errstate(invalid="ignore", divide="ignore"):
        noise = np.where(scale > 0, eager_error / scale, 0.0)
    # No sum of n terms is off by more than n roundings; what is, was not rounding.
    most = _longest_sum(network) * np.finfo(np.float32).eps
    per_group = {
        group: min(most, _largest(noise[probes.groups == group]))
        for group in np.unique(probes.groups)
    }
    per_row = np.array([per_group[group] for group in probes.groups])[:, None]
    own_rule = RELATIVE_TOLERANCE * np.maximum(1.0, np.abs(outputs))
    eagers = EAGER_FACTOR * np.maximum(eager_error, per_row * scale)
    return np.maximum(own_rule, eagers)


def _rounding_scale(network: KAN, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sum, for each output, the magnitudes whose rounding it holds, in float64.

    To first order a float32 result is off by a small multiple of the unit roundoff times this: the
    magnitudes of the terms its last layer adds up, and, through the slopes of that layer, the same
    of the layers before. See N. Higham, Accuracy and Stability of Numerical Algorithms, section
    3.3, running error analysis.

    Returns:
        Shape (rows, out), in the units of the output.
    """
    # float32 inputs are exact, but knots rounded from float64 shift a spline like its input.
    exact = network.layers[0].grid.dtype == torch.float32
    model = copy.deepcopy(network).double()
    parts = []
    with torch.no_grad():
        for value in torch.split(torch.from_numpy(inputs).double(), _CHUNK_ROWS):
            scale = torch.zeros_like(value) if exact else value.abs()
            for layer in model.layers:
                scale, value = _layer_rounding_scale(layer, value, scale), layer(value)
            parts.append(scale)
    return torch.cat(parts).numpy()


def _layer_rounding_scale(layer: KANLinear, value: Tensor, scale: Tensor) -> Tensor:
    """Carry the scale of the rounding in a layer's inputs, (rows, in), to its outputs."""
    basis = b_spline_basis(value, layer.grid, layer.spline_order)  # (rows, in, n)
    basis_slope = b_spline_slope(value, layer.grid, layer.spline_order)
    with torch.enable_grad():  # the slope of the activation, which acts on each element alone
        leaf = value.clone().requires_grad_()
        base = layer.base_activation(leaf)
        (base_slope,) = torch.autograd.grad(base.sum(), leaf)
    of_base = base.detach().abs() + base_slope.abs() * scale
    of_spline = basis.abs() + basis_slope.abs() * scale.unsqueeze(-1)
    return linear(of_base, layer.base_weight.abs()) + linear(
        of_spline.flatten(-2), layer.scaled_spline_weight.abs().flatten(1)
    )


def _longest_sum(network: KAN) -> int:
    """Count the terms of the longest sum on any way through the network."""
    return sum(
        layer.in_features * (layer.grid_size + layer.spline_order + 1) for layer in network.layers
    )


def _evaluate(network: KAN, dtype: torch.dtype, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.no_grad():
        model = copy.deepcopy(network).to(dtype)
        parts = [
            model(x.to(dtype)).double() for x in torch.split(torch.from_numpy(inputs), _CHUNK_ROWS)
        ]
    return torch.cat(parts).numpy()


def _run_in_batches(
    run: Runner, inputs: NDArray[np.float32], batch_size: int
) -> NDArray[np.float64]:
    starts = range(0, len(inputs), batch_size)
    return np.concatenate([run(inputs[i : i + batch_size]) for i in starts]).astype(np.float64)


def _without_undecidable(network: KAN, probes: Probes) -> Probes:
    """Leave out the probes at which an order-0 spline of a hidden layer would have to jump.

    A spline of order 0 is a staircase. Where the value that reaches a hidden layer lies on a step,
    within what float32 can tell, no float32 model, eager included, is bound to either side.
    """
    keep = np.ones(len(probes.inputs), dtype=bool)
    with torch.no_grad():
        hidden = torch.from_numpy(probes.inputs).double()
        for before, layer in pairwise(copy.deepcopy(network).double().layers):
            hidden = before(hidden)  # (rows, in)
            if layer.spline_order == 0:
                near = (hidden.unsqueeze(-1) - layer.grid).abs().amin(dim=-1)  # (rows, in)
                slack = RELATIVE_TOLERANCE * hidden.abs().clamp_min(1.0)
                keep &= ~(near <= slack).any(dim=-1).numpy()
    return Probes(probes.inputs[keep], probes.groups[keep])


def _largest(values: NDArray[np.float64]) -> float:
    """The largest value that is a number; NaN marks a pair of NaNs, which agree."""
    numbers = values[~np.isnan(values)]
    return float(numbers.max()) if numbers.size else 0.0
