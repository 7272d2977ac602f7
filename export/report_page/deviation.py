"""How far a runtime was from the reference, over all probes: what the report shows of it.

`export.proof.parity` judges; this module counts and places what was measured there, for two charts:
how often which share of what is allowed was needed, and how the error goes with the distance from
the grid. Nothing here knows HTML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.network import Network
from export.proof.parity import Measurement
from export.proof.reference import Reference
from kan_bundle.golden import excess

DECADES = 6
"""How far below what is allowed errors are told apart."""
PARTS = 2
"""Bars of a decade."""

_MOST_VALUES = 2048  # of the input of the worst probe that are told
_NEAREST, _FARTHEST = 1e-3, 1e7  # distances from a grid, in its widths, that are told apart


@dataclass(frozen=True)
class WorstProbe:
    """Where a runtime was furthest off.

    Attributes:
        group: Of the probe.
        batch_size: The batch it ran in.
        row: Its number.
        output: Which number of which output, as `output[3]`.
        expected: The reference.
        found: The runtime's answer.
        allowed: What it may be off by.
        inputs: Values of each input of the network, flattened, as float32 or whole numbers are
            written, and how many there are; of many the first.
    """

    group: str
    batch_size: int
    row: int
    output: str
    expected: float
    found: float
    allowed: float
    inputs: tuple[tuple[str, tuple[str, ...], int], ...]


@dataclass(frozen=True)
class Deviation:
    """What the charts of one runtime show.

    Attributes:
        measurement: The runtime's.
        exact: Numbers that were exactly the reference's, rounded to float32 or not.
        undefined: Those that were NaN where the reference is; they are counted nowhere else.
        counts: Numbers that needed a share of what is allowed from 10^-DECADES on, in `PARTS` bars
            a decade; what is less is in the first one.
        distance: Of each probe, in `distance_is`; shape (rows,).
        error: The largest |y - y64| / max(1, |y64|) of each probe, shape (rows,).
        worst: The probe.
    """

    measurement: Measurement
    exact: int
    undefined: int
    counts: tuple[int, ...]
    distance: NDArray[np.float64]
    error: NDArray[np.float64]
    worst: WorstProbe

    @property
    def numbers(self) -> int:
        """Numbers compared that are numbers."""
        return self.exact + sum(self.counts)


def describe_deviations(
    network: Network,
    reference: Reference,
    found: Mapping[str, NDArray[np.float64]],
    measured: Sequence[Measurement],
) -> tuple[Deviation, ...]:
    """Bring what each runtime answered into the form of the charts.

    Args:
        network: What was exported.
        reference: As it was measured against.
        found: Each runtime's outputs, shape (batch sizes, rows, numbers).
        measured: Each runtime's measurement.
    """
    distance = _distance(network, reference)
    return tuple(_describe(m, found[m.runtime], reference, network, distance) for m in measured)


def has_grid(network: Network) -> bool:
    """Tell whether the distance is that from a grid, in its widths; else it is the largest |x|."""
    return network.leading is not None


def _describe(
    measurement: Measurement,
    answers: NDArray[np.float64],
    reference: Reference,
    network: Network,
    distance: NDArray[np.float64],
) -> Deviation:
    ratio = np.stack([excess(a, reference.outputs, reference.tolerance) for a in answers])
    undefined = np.isnan(answers) & np.isnan(reference.outputs)
    with np.errstate(over="ignore"):
        rounded = reference.outputs.astype(np.float32).astype(np.float64)
    exact = (answers == reference.outputs) | (answers == rounded)
    with np.errstate(divide="ignore"):
        place = np.floor((np.log10(ratio[~exact & ~undefined]) + DECADES) * PARTS)
    place = np.clip(place, 0, DECADES * PARTS - 1).astype(int)
    counts = np.bincount(place, minlength=DECADES * PARTS)
    with np.errstate(invalid="ignore"):
        off = np.abs(answers - reference.outputs) / np.maximum(1.0, np.abs(reference.outputs))
    error = np.where(np.isfinite(off), off, 0.0).max(axis=(0, 2), initial=0.0)
    told = np.isfinite(reference.outputs).any(axis=1) & np.isfinite(distance)
    return Deviation(
        measurement=measurement,
        exact=int(exact.sum()),
        undefined=int(undefined.sum()),
        counts=tuple(counts.tolist()),
        distance=distance[told],
        error=error[told],
        worst=_describe_worst(measurement, reference, network),
    )


def _describe_worst(measurement: Measurement, reference: Reference, network: Network) -> WorstProbe:
    worst = measurement.worst
    inputs = []
    for spec, array in zip(network.inputs.specs, reference.probes.inputs, strict=True):
        values = array[worst.row].reshape(-1)
        inputs.append((spec.name, tuple(str(v) for v in values[:_MOST_VALUES]), values.size))
    return WorstProbe(
        group=worst.group,
        batch_size=worst.batch_size,
        row=worst.row,
        output=network.name_output(worst.output),
        expected=worst.expected,
        found=worst.found,
        allowed=worst.allowed,
        inputs=tuple(inputs),
    )


def _distance(network: Network, reference: Reference) -> NDArray[np.float64]:
    """Measure how far each probe is from the grid of the layer that inputs reach as they are.

    Returns:
        The largest over the features, in widths of the grid, 0 within it; without such a layer the
        largest magnitude of the inputs. NaN where an input is. Shape (rows,).
    """
    rows = len(reference.probes)
    if network.leading is None:
        largest = np.zeros(rows)
        for array in reference.probes.inputs:
            flat = array.reshape(rows, -1).astype(np.float64)
            largest = np.maximum(largest, np.abs(flat).max(axis=1, initial=0.0))
        return largest
    layer = network.layers[network.leading]
    grid = layer.grid.detach().double().numpy()
    low, high = grid[:, layer.spline_order], grid[:, layer.spline_order + layer.grid_size]
    x = reference.probes.inputs[0].reshape(rows, -1).astype(np.float64)
    beyond = np.maximum(0, np.maximum(low - x, x - high)) / (high - low)
    distance: NDArray[np.float64] = beyond.max(axis=1)  # NaN stays NaN
    return np.where(distance > 0, np.clip(distance, _NEAREST, _FARTHEST), distance)
