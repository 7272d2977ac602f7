"""Inputs that matter, for splines and for networks that hold them.

Random points alone hide errors: what goes wrong in a spline goes wrong at a knot, in the last bit
beside it, past the grid where the basis fades, or far away where only the base path is left. Each
group here goes to one of those places, in every feature at once and in every feature by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.inputs import Inputs
from kan_bundle.manifest import DATATYPES, TensorSpec

ORDINARY = ("knots", "inside", "margin", "samples", "small", "normal")
"""Groups of probes that a network was made for; for a KAN, those within the outermost knots."""

_RANDOM_ROWS = 64
_SAMPLE_ROWS = 1024
_LONE_ROWS = 16
_NAN_PLACES = 16  # of each input, in which NaN stands alone
_FAR = (1.0, 10.0, 1e3, 1e6)  # distance from the outermost knot, in widths of the knots


@dataclass(frozen=True)
class Probes:
    """Inputs and where they lie.

    Attributes:
        inputs: One array for each input of the network, shape (rows, ...).
        groups: Name of each row's group, shape (rows,).
    """

    inputs: tuple[NDArray[np.generic], ...]
    groups: NDArray[np.str_]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.groups)

    def take(self, rows: NDArray[np.bool_ | np.intp]) -> "Probes":
        """Keep some rows, by mask or by number."""
        return Probes(tuple(array[rows] for array in self.inputs), self.groups[rows])

    def evenly(self, most: int) -> NDArray[np.intp]:
        """Choose at most so many rows of every group, evenly spread, by number."""
        kept = [
            members[np.linspace(0, len(members) - 1, min(most, len(members))).astype(int)]
            for group in dict.fromkeys(self.groups.tolist())
            if len(members := np.flatnonzero(self.groups == group))
        ]
        return np.concatenate(kept)

    def join(self, other: "Probes") -> "Probes":
        """Put the rows of another set behind these."""
        pairs = zip(self.inputs, other.inputs, strict=True)
        return Probes(
            tuple(np.concatenate(pair) for pair in pairs),
            np.concatenate([self.groups, other.groups]),
        )


def make_kan_probes(
    knots: NDArray[np.float32], order: int, rows_per_group: int | None = None, seed: int = 0
) -> Probes:
    """Make the probes for a layer with these knots.

    Groups: `knots` (every knot and its float32 neighbours on either side), `inside` the grid,
    `margin` (between the grid's ends and the outermost knots), `outside` those, and `nan` (one
    feature is NaN, or all).

    Args:
        knots: Knots of the layer, shape (in, G + 2k + 1).
        order: k, the spline order.
        rows_per_group: Keep at most so many of each group.
        seed: Of the random choices.

    Returns:
        Probes for one input of `in` features.
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
    probes = Probes(
        (inputs.astype(np.float32),),
        np.repeat(list(groups), [len(rows) for rows in groups.values()]),
    )
    return probes if rows_per_group is None else probes.take(probes.evenly(rows_per_group))


def make_probes(inputs: Inputs, seed: int = 0) -> Probes:
    """Make the probes for a network of which only the inputs are known.

    Groups: `samples` as given; `small` (uniform in [-1, 1] and a hundredth of that), `normal`
    (standard normal), `large` (ten times that), `huge` (a hundred times), constants among the small
    ones, and `nan` (in one place of one input, or in all of it). Without floating-point inputs
    there are the samples only.

    Args:
        inputs: What the network takes.
        seed: Of the random choices.
    """
    rng = np.random.default_rng(seed)
    nan = _choose_nan(inputs.specs)
    sizes = {"small": 32, "normal": 32, "large": 16, "huge": 16, "nan": len(nan)}
    if inputs.samples is not None:
        chosen = np.linspace(0, len(inputs.samples[0]) - 1, _SAMPLE_ROWS).astype(int)
        chosen = np.unique(chosen)
        samples = Probes(
            tuple(array[chosen] for array in inputs.samples), np.repeat("samples", len(chosen))
        )
        if all(spec.datatype != "FP32" for spec in inputs.specs):
            return samples
    arrays = [
        _random(spec, sizes, rng, None if inputs.samples is None else inputs.samples[i])
        for i, spec in enumerate(inputs.specs)
    ]
    for row, (i, place) in enumerate(nan, start=len(arrays[0]) - len(nan)):
        arrays[i][row].reshape(-1)[place] = np.nan
    probes = Probes(tuple(arrays), np.repeat(list(sizes), list(sizes.values())))
    return probes if inputs.samples is None else samples.join(probes)


def _choose_nan(specs: Sequence[TensorSpec]) -> list[tuple[int, slice]]:
    """Choose where NaN stands in each row of the group `nan`: an input, and places of its row.

    One place at a time, from the first to the last of each input; then all of an input.
    """
    chosen = []
    for i, spec in enumerate(specs):
        if spec.datatype == "FP32":
            size = math.prod(spec.shape[1:])
            places = np.unique(np.linspace(0, size - 1, _NAN_PLACES).astype(int))
            chosen += [(i, slice(place, place + 1)) for place in places.tolist()]
            chosen.append((i, slice(None)))
    return chosen


def _random(
    spec: TensorSpec,
    sizes: dict[str, int],
    rng: np.random.Generator,
    samples: NDArray[np.generic] | None,
) -> NDArray[np.generic]:
    """Make one input's rows for every group; whole numbers are taken from the samples."""
    rows = sum(sizes.values())
    shape = spec.shape[1:]
    if spec.datatype != "FP32":
        if samples is not None:
            return samples[rng.integers(len(samples), size=rows)]
        values = rng.integers(2 if spec.datatype == "BOOL" else 256, size=(rows, *shape))
        return values.astype(DATATYPES[spec.datatype])
    small = rng.uniform(-1, 1, (sizes["small"], *shape))
    small[::2] *= 0.01
    for row, constant in zip((1, 3, 5), (0.0, 1.0, -1.0), strict=True):
        small[row] = constant
    normal = rng.standard_normal((sizes["normal"], *shape))
    large = 10 * rng.standard_normal((sizes["large"], *shape))
    huge = 100 * rng.standard_normal((sizes["huge"], *shape))
    nan = rng.standard_normal((sizes["nan"], *shape))
    return np.concatenate([small, normal, large, huge, nan]).astype(np.float32)
