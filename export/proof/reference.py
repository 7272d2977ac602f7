"""What a float32 runtime should answer at the probes.

The oracle is the network itself in float64, which for a KAN is the Cox-de Boor recursion on the
checkpoint's own numbers. How far from it is still right, tolerance.py says.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from export.advice import explain_coupled_rows, find_coupled_rows
from export.errors import NetworkError, cause, refused_samples
from export.network import Call, Network, is_single
from export.probes import ORDINARY, Probes, make_kan_probes, make_probes
from export.proof.eager import BATCH_SIZES, LARGEST_BATCH, evaluate, in_double
from export.proof.rounding import decidable, longest_sum, rounding_scale, sensitivity
from export.proof.tolerance import (
    FEWEST_ALIKE,
    KAN_FACTOR,
    NETWORK_FACTOR,
    allowed_deviation,
    group_by_magnitude,
    kan_noise,
    largest_error,
    network_noise,
)
from kan_bundle.manifest import TensorSpec

_LARGEST = 1e37  # of the terms of a sum; float32 ends at 3.4e38
_BUDGET = 2**21  # numbers that the probes of a network may hold, on its larger side
_LARGEST_BATCH_NUMBERS = 2**20  # on the larger side, of rows that run at a time in float32
_FEWEST_ROWS = 1  # at a time in float64, because a large network leaves little room
_ROWS_BUDGET = 2**19  # numbers of the rows that run at a time in float64, on the larger side
_ROWS_OF_A_GROUP = 6  # that a network runs in small batches as well; a KAN runs all
_ROWS_WITH_NOISE = 32  # of those that are alike, from which the noise of all is taken
_ALONE = 4  # rows that are run by themselves


@dataclass(frozen=True)
class _Means:
    """A precision: the noise that shows in it, and how far batches may differ in it.

    Attributes:
        dtype: What it is.
        noise: Large enough to show, and in float64 small enough for float32's rounding to undo.
        same: Share of an output's own size.
        last_digits: Share of the size of the largest output.
    """

    dtype: torch.dtype
    noise: float
    same: float
    last_digits: float


_DOUBLE = _Means(torch.float64, 2.0**-26, 1e-7, 1e-13)
_SINGLE = _Means(torch.float32, 2.0**-16, 1e-3, 1e-5)


@dataclass(frozen=True)
class Reference:
    """Right answers. The outputs of a row are flattened and side by side.

    Attributes:
        probes: The inputs.
        outputs: Answers in float64, shape (rows, numbers).
        eager: The eager float32 model's answers in batches of each of `batch_sizes`, shape
            (batch sizes, rows, numbers).
        tolerance: Largest allowed |y - outputs|, shape (rows, numbers).
        noise: Deviation that rounding in float32 explains, shape (rows, numbers).
        precision: Of `outputs`: float64, or float32 if the network cannot run in float64.
        inputs: What the network takes.
        specs: What the network returns.
        refused: Groups of probes that the network itself refuses, which were left out.
        every_size: Whether every row is run in batches of every size, not only in the largest.
    """

    probes: Probes
    outputs: NDArray[np.float64]
    eager: NDArray[np.float64]
    tolerance: NDArray[np.float64]
    noise: NDArray[np.float64]
    inputs: tuple[TensorSpec, ...]
    specs: tuple[TensorSpec, ...]
    precision: Literal["float64", "float32"] = "float64"
    refused: tuple[str, ...] = ()
    every_size: bool = True

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Rows that run at a time; see `choose_batch_sizes`."""
        return choose_batch_sizes((self.inputs, self.specs))

    @property
    def rows_by_size(self) -> tuple[NDArray[np.intp], ...]:
        """Rows to run in batches of each of `batch_sizes`, by number."""
        return _rows_by_size(self.probes, every_size=self.every_size)

    def take(self, rows: NDArray[np.bool_]) -> "Reference":
        """Keep some rows."""
        return replace(
            self,
            probes=self.probes.take(rows),
            outputs=self.outputs[rows],
            eager=self.eager[:, rows],
            tolerance=self.tolerance[rows],
            noise=self.noise[rows],
        )


def make_reference(network: Network) -> Reference:
    """Compute the answers and tolerances for a network.

    Args:
        network: It is as it was when this returns.

    Raises:
        NetworkError: It fails on inputs it should take, lets the rows of a batch influence each
            other, or answers no ordinary input with a number.
    """
    probes, refused = _choose_probes(network)
    kan = network.kan
    rows_by_size = _rows_by_size(probes, every_size=kan is not None)
    runs = [
        _run(network.call, probes.take(rows), size)
        for size, rows in zip(choose_batch_sizes(_sides(network)), rows_by_size, strict=True)
    ]
    eager = spread_by_size(runs, rows_by_size)
    if kan is None:
        return replace(_reference_of_network(network, probes, eager), refused=refused)
    exact = is_single(kan)
    oracle = copy.deepcopy(kan).double()
    inputs = probes.inputs[0].astype(np.float32)
    scale = rounding_scale(oracle, inputs, exact)
    in_range = (scale <= _LARGEST).all(axis=1) | np.isnan(inputs).any(axis=1)
    keep: NDArray[np.bool_] = in_range & decidable(oracle, inputs, exact)
    probes, scale, eager = probes.take(keep), scale[keep], eager[:, keep]
    outputs = evaluate(Call(oracle, ["x"]), probes.inputs, LARGEST_BATCH, torch.float64)
    _require_numbers(probes, outputs)
    error = largest_error(eager, outputs)
    noise = np.maximum(error, kan_noise(probes.groups, error, scale, longest_sum(kan)))
    tolerance = allowed_deviation(probes.groups, outputs, noise, KAN_FACTOR)
    specs = (network.inputs.specs, network.outputs)
    return Reference(probes, outputs, eager, tolerance, noise, *specs)


def choose_batch_sizes(sides: Sequence[Sequence[TensorSpec]]) -> tuple[int, ...]:
    """Choose the rows that run at a time: `BATCH_SIZES`, the largest less where rows are large.

    Args:
        sides: What the network takes, and what it returns.
    """
    largest = _LARGEST_BATCH_NUMBERS // _numbers_of_a_row(sides)
    return (*BATCH_SIZES[:-1], int(np.clip(largest, BATCH_SIZES[-2], BATCH_SIZES[-1])))


def _numbers_of_a_row(sides: Sequence[Sequence[TensorSpec]]) -> int:
    """Count the numbers of a row, on the larger side."""
    return max(1, *(sum(math.prod(spec.shape[1:]) for spec in specs) for specs in sides))


def spread_by_size(
    runs: Sequence[NDArray[np.float64]], rows_by_size: Sequence[NDArray[np.intp]]
) -> NDArray[np.float64]:
    """Lay the answers of each batch size out alike.

    Args:
        runs: Answers for each batch size, shape (rows run, numbers); the last of all rows.
        rows_by_size: Numbers of the rows that were run.

    Returns:
        Shape (batch sizes, rows, numbers); the largest batch stands in where a row was not run.
    """
    found = np.stack([runs[-1]] * len(runs))
    for own, rows, run in zip(found, rows_by_size, runs, strict=True):
        own[rows] = run
    return found


def _rows_by_size(probes: Probes, *, every_size: bool) -> tuple[NDArray[np.intp], ...]:
    every = np.arange(len(probes))
    some = every if every_size else probes.evenly(_ROWS_OF_A_GROUP)
    return (*[some] * (len(BATCH_SIZES) - 1), every)


def _run(call: Call, probes: Probes, batch_size: int) -> NDArray[np.float64]:
    try:
        return evaluate(call, probes.inputs, batch_size)
    except Exception as error:  # the network's own code may fail in any way
        raise NetworkError(
            f"the network fails on batches of {batch_size}: {cause(error)}; it must take any "
            f"number of rows. {find_coupled_rows(call.module)}".removesuffix(". ")
        ) from error


def _choose_probes(network: Network) -> tuple[Probes, tuple[str, ...]]:
    """Make the probes of the first layer, if the inputs reach it, and those of any network.

    Returns:
        The probes, and the groups that were left out because the network itself refuses them.
    """
    probes = make_probes(network.inputs)
    if network.leading is not None:
        layer = network.layers[network.leading]
        at_knots = make_kan_probes(layer.grid.numpy(), layer.spline_order)
        shape = network.inputs.specs[0].shape
        at_knots = Probes((at_knots.inputs[0].reshape(shape),), at_knots.groups)
        given = probes.take(probes.groups == "samples")
        probes = given.join(at_knots) if network.kan else probes.join(at_knots)
    numbers = _numbers_of_a_row(_sides(network))
    most = max(1, _BUDGET // numbers // len(np.unique(probes.groups)))
    probes = probes.take(probes.evenly(most))
    try:
        evaluate(network.call, probes.inputs, choose_batch_sizes(_sides(network))[-1])
    except Exception:  # some networks refuse NaN, or numbers they were not made for
        return _accepted(network, probes)
    return probes, ()


def _accepted(network: Network, probes: Probes) -> tuple[Probes, tuple[str, ...]]:
    """Keep the groups of probes that the network does not refuse.

    Raises:
        NetworkError: It refuses samples, or everything that it could be made for.
    """
    kept, refused, last = [], [], None
    for group in dict.fromkeys(probes.groups.tolist()):
        part = probes.take(probes.groups == group)
        try:
            evaluate(network.call, part.inputs, LARGEST_BATCH)
            kept.append(group)
        except Exception as error:
            refused.append(group)
            last = error
            if group == "samples":
                raise refused_samples(error) from error
    if last is not None and not set(kept) & set(ORDINARY):
        raise NetworkError(
            f"the network fails on every ordinary input tried: {cause(last)}; give rows that it "
            "takes with --samples"
        ) from last
    return probes.take(np.isin(probes.groups, kept)), tuple(refused)


def _reference_of_network(
    network: Network, probes: Probes, eager: NDArray[np.float64]
) -> Reference:
    """Compare with the network in float64; with itself in float32 if it has no float64 form."""
    rows = _rows_at_once(network)
    try:
        with in_double(network.exact) as call:
            outputs = evaluate(call, probes.inputs, rows, torch.float64)
            _require_lone_rows(call, probes, _DOUBLE)
            scale = _sensitivity(call, probes, outputs, _DOUBLE, rows)
        precision: Literal["float64", "float32"] = "float64"
    except NetworkError:
        raise
    except Exception:  # it has run in float32, so it is float64 that something in it does not take
        precision, outputs = "float32", eager[-1]
        _require_lone_rows(network.call, probes, _SINGLE)
        scale = _sensitivity(copy.deepcopy(network.call), probes, outputs, _SINGLE, rows)
    lost = np.isfinite(outputs) & ~np.isfinite(eager).all(axis=0)
    kept: NDArray[np.bool_] = np.logical_not(lost.any(axis=1))
    probes, outputs, eager, scale = probes.take(kept), outputs[kept], eager[:, kept], scale[kept]
    _require_numbers(probes, outputs)
    error = largest_error(eager, outputs)
    noise = np.maximum(
        error, network_noise(group_by_magnitude(probes), error, scale, precision == "float64")
    )
    tolerance = allowed_deviation(probes.groups, outputs, noise, NETWORK_FACTOR)
    specs = (network.inputs.specs, network.outputs)
    return Reference(
        *(probes, outputs, eager, tolerance, noise, *specs),
        precision=precision,
        every_size=False,
    )


def _rows_at_once(network: Network) -> int:
    """Choose how many rows run at a time in float64."""
    numbers = _numbers_of_a_row(_sides(network))
    return int(np.clip(_ROWS_BUDGET // numbers, _FEWEST_ROWS, LARGEST_BATCH))


def _sides(network: Network) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec]]:
    return network.inputs.specs, network.outputs


def _require_numbers(probes: Probes, outputs: NDArray[np.float64]) -> None:
    """Raise if there is nothing to compare.

    Raises:
        NetworkError: No ordinary input is left that is answered with a number.
    """
    if not np.isfinite(outputs[np.isin(probes.groups, ORDINARY)]).any():
        raise NetworkError(
            "the network answers every ordinary input with NaN, infinity or numbers at the end of "
            "float32, so nothing can be compared; look at its weights, or give rows of real data "
            "with --samples"
        )


def _require_lone_rows(call: Call, probes: Probes, means: _Means) -> None:
    """Raise if what a row is answered depends on the rows beside it.

    Raises:
        NetworkError: It does.
    """
    rows = np.flatnonzero(np.isin(probes.groups, ORDINARY))[:_ALONE]
    some = probes.take(rows)
    alone = evaluate(call, some.inputs, 1, means.dtype)
    together = evaluate(call, some.inputs, max(1, len(rows)), means.dtype)
    size = np.nan_to_num(np.abs(alone)).max(axis=0)
    # What cancels to almost nothing keeps the rounding of what it was made of.
    allowed = means.same * size + means.last_digits * size.max()
    with np.errstate(invalid="ignore"):
        if bool((np.abs(alone - together) > allowed).any()):
            raise NetworkError(
                "the rows of a batch influence each other: a row is answered otherwise alone than "
                f"among others; {explain_coupled_rows(call.module)}"
            )


def _sensitivity(
    call: Call, probes: Probes, outputs: NDArray[np.float64], means: _Means, rows_at_once: int
) -> NDArray[np.float64]:
    """Find the noise to be expected, alike for rows that are alike, shape (rows, numbers)."""

    def run(inputs: tuple[NDArray[np.generic], ...]) -> NDArray[np.float64]:
        return evaluate(call, inputs, rows_at_once, means.dtype)

    alike = group_by_magnitude(probes)
    some = Probes(probes.inputs, alike).evenly(_ROWS_WITH_NOISE)
    some = some[np.isfinite(outputs[some]).any(axis=1)]  # NaN has no noise
    moved = np.zeros((len(some), outputs.shape[1]))
    if len(some):
        given = probes.take(some).inputs
        moved = sensitivity(call, given, run, outputs[some], means.noise)
    scale = np.zeros_like(outputs)
    for group in np.unique(alike[some]):
        own = np.sqrt((moved[alike[some] == group] ** 2).mean(axis=0))
        if (alike[some] == group).sum() < FEWEST_ALIKE:  # some number hardly moves by chance
            own = np.maximum(own, np.median(own))
        scale[alike == group] = own
    return scale
