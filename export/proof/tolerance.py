"""How far from the reference a float32 runtime may be and still be right.

An output may be off by what float32 noise explains there, which is a multiple of the noise that is
estimated (`KAN_FACTOR`, `NETWORK_FACTOR`), but by no more than `RELATIVE_TOLERANCE` times the size
of that output, which is its largest magnitude at ordinary inputs, at most 1, or |y64| if that is
more. Where the noise is large, half that multiple of it is allowed: for a KAN twice the noise.

Eager's error at one output is a single draw of rounding noise. So its size is taken from batches of
every size and the whole group of probes, relative to the noise that each output must be expected to
hold (rounding.py): for a KAN from the magnitudes that are added up to give it, for other networks
from how far it moves with everything before it. Only a KAN's noise is known well enough to be
compared between outputs; elsewhere each output is judged by its own, within bounds.
"""

import numpy as np
from numpy.typing import NDArray

from export.probes import ORDINARY, Probes

RELATIVE_TOLERANCE = 1e-5
KAN_FACTOR, NETWORK_FACTOR = 4.0, 8.0
"""Multiples of the estimated noise that noise explains.

In all runtimes, honest files were off by at most 1.8 times the estimate for KANs of many shapes,
and by 3.3 times for other networks, of which noise is estimated from a few draws.
"""

_LAST_DIGITS = 2.0**-23  # of an output's size: two roundings of it
_LEAST_NOISE, _MOST_NOISE = 4.0, 64.0  # in units of a sensitivity
_MOST_SHOWN = 16.0  # times eager's largest error at any output, for inputs that are alike
FEWEST_ALIKE = 8
"""Rows of one magnitude, from which the noise of each number can be taken."""


def largest(values: NDArray[np.float64]) -> float:
    """Take the largest value that is a number; NaN marks a pair of NaNs, which agree."""
    numbers = values[~np.isnan(values)]
    return float(numbers.max()) if numbers.size else 0.0


def group_by_magnitude(probes: Probes) -> NDArray[np.str_]:
    """Part the groups of probes by the largest number in a row, in powers of ten.

    A decade with few rows joins the nearest one of its group that has many: noise taken from a few
    draws may be many times too small.

    Returns:
        Names of the parts, shape (rows,).
    """
    size = np.zeros(len(probes))
    for array in probes.inputs:
        if array.dtype.kind == "f":
            numbers = np.nan_to_num(np.abs(array.reshape(len(array), -1)))
            size = np.maximum(size, numbers.max(axis=1, initial=0.0))
    decade = np.floor(np.log10(np.maximum(size, 1e-30))).astype(int)
    for group in np.unique(probes.groups):
        rows = probes.groups == group
        decades, counts = np.unique(decade[rows], return_counts=True)
        many = decades[counts >= FEWEST_ALIKE]
        if not len(many):
            many = decades[-1:]
        nearest = np.abs(decade[rows, None] - many).argmin(axis=1)
        decade[rows] = many[nearest]
    return np.array([f"{g} {d}" for g, d in zip(probes.groups, decade, strict=True)])


def largest_error(eager: NDArray[np.float64], outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take eager's largest error over all batch sizes, shape (rows, numbers).

    Where eager itself is NaN or infinite it must not widen what is allowed: it fails instead.
    """
    with np.errstate(invalid="ignore"):
        error: NDArray[np.float64] = np.where(np.isfinite(eager), np.abs(eager - outputs), 0.0)
    finite: NDArray[np.float64] = np.where(np.isfinite(error), error, 0.0).max(axis=0)
    return finite


def kan_noise(
    groups: NDArray[np.str_],
    error: NDArray[np.float64],
    scale: NDArray[np.float64],
    terms: int,
) -> NDArray[np.float64]:
    """Estimate the noise of a KAN from all outputs of a group, shape (rows, numbers).

    Args:
        groups: Shape (rows,).
        error: Eager's, shape (rows, numbers).
        scale: From `rounding_scale`, shape (rows, numbers).
        terms: Of the longest sum.
    """
    ratio = _in_units(error, scale)
    # No sum of n terms is off by more than n roundings; what is, was not rounding.
    bound = terms * np.finfo(np.float32).eps
    ratio_of = {group: min(bound, largest(ratio[groups == group])) for group in np.unique(groups)}
    return np.array([ratio_of[group] for group in groups])[:, None] * scale


def network_noise(
    groups: NDArray[np.str_], error: NDArray[np.float64], scale: NDArray[np.float64], exact: bool
) -> NDArray[np.float64]:
    """Estimate the noise of a network, each output by itself, shape (rows, numbers).

    Args:
        groups: Shape (rows,).
        error: Eager's, shape (rows, numbers).
        scale: From `sensitivity`, shape (rows, numbers).
        exact: Whether eager's error is that from float64; from itself it says nothing.
    """
    ratio = _in_units(error, scale)
    noise = np.empty_like(scale)
    for group in np.unique(groups):
        rows = groups == group
        own = np.clip(ratio[rows].max(axis=0), _LEAST_NOISE, _MOST_NOISE)
        # Where the noise that is added moves all outputs much further than eager ever is, it is
        # noise that no runtime has, as in a mask of -1e38.
        limit = _MOST_SHOWN * largest(ratio[rows]) if exact else np.inf
        noise[rows] = np.minimum(own, limit) * scale[rows]
    return noise


def _in_units(error: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Express errors in units of the noise expected, 0 where none is; shape (rows, numbers)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, error / scale, 0.0)


def allowed_deviation(
    groups: NDArray[np.str_],
    outputs: NDArray[np.float64],
    noise: NDArray[np.float64],
    factor: float,
) -> NDArray[np.float64]:
    """Apply the rule at the top of this module.

    Args:
        groups: Shape (rows,).
        outputs: The answers in float64, shape (rows, numbers).
        noise: As estimated, at least eager's own error, shape (rows, numbers).
        factor: Multiple of the noise that noise explains.
    """
    size = np.minimum(1.0, _size(outputs, np.isin(groups, ORDINARY)))  # (numbers,)
    size = np.maximum(size, np.abs(outputs))
    explained = np.maximum(factor * noise, _LAST_DIGITS * size)
    allowed = np.maximum(np.minimum(explained, RELATIVE_TOLERANCE * size), factor / 2 * noise)
    return np.where(np.isfinite(outputs), allowed, 0.0)  # NaN and infinity match themselves alone


def _size(outputs: NDArray[np.float64], ordinary: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Find the largest magnitude of each output at ordinary inputs, shape (numbers,)."""
    magnitude = np.abs(outputs[ordinary])
    size: NDArray[np.float64] = np.where(np.isfinite(magnitude), magnitude, 0.0).max(
        axis=0, initial=0.0
    )
    return size
