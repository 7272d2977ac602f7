"""Places in the two charts of a runtime's errors; the page's template draws them.

Each lies in a plane `WIDTH` by `HEIGHT`, y down. Axes are logarithmic, with a place of its own for
what has no logarithm: an error of nothing, an input within the grid. This module knows no HTML.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.report_page.deviation import DECADES, PARTS, Deviation

WIDTH = 320
HEIGHT = 150
LEFT, RIGHT, TOP, BOTTOM = 42.0, 314.0, 10.0, 124.0
"""Edges of the area that is drawn on; beyond them are the axes' numbers."""

_FIRST = 46.0  # width of the place for what has no logarithm
_GAP = 6.0
_SUPERSCRIPTS = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
_LOWEST = 1e-12  # of what an axis is made for; what is less is at its end


@dataclass(frozen=True)
class Tick:
    """A number on an axis."""

    place: float
    text: str


@dataclass(frozen=True)
class Bar:
    """A bar from the bottom up, and how many it stands for."""

    x: float
    y: float
    width: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """How many numbers needed which share of what is allowed.

    Attributes:
        bars: Only those that are not empty.
        across: Numbers of the horizontal axis.
        top: The share of all numbers that the highest bar is.
        summary: What it shows, in words.
    """

    bars: tuple[Bar, ...]
    across: tuple[Tick, ...]
    top: str
    summary: str


@dataclass(frozen=True)
class Scatter:
    """The error of each probe by its distance.

    Attributes:
        dots: As the path of an SVG.
        across: Numbers of the horizontal axis.
        up: Numbers of the vertical axis.
        divide: Where the place for inputs within the grid ends; None if there is none.
        summary: What it shows, in words.
    """

    dots: str
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    divide: float | None
    summary: str


def power(exponent: int) -> str:
    """Write a power of ten."""
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def draw_histogram(deviation: Deviation) -> Histogram:
    """Place the bars of a runtime."""
    numbers = max(1, deviation.numbers)
    highest = max(deviation.exact, *deviation.counts) or 1
    start = LEFT + _FIRST
    step = (RIGHT - start) / len(deviation.counts)
    places = [(LEFT, _FIRST - _GAP, "exact", deviation.exact)]
    for i, count in enumerate(deviation.counts):
        ends = [
            _share_of_allowed(i / PARTS - DECADES),
            _share_of_allowed((i + 1) / PARTS - DECADES),
        ]
        text = f"up to {ends[1]} of what is allowed" if i == 0 else f"{ends[0]} to {ends[1]}"
        places.append((start + i * step, step - 1, text, count))
    bars = [
        Bar(x, BOTTOM - max(1.0, (BOTTOM - TOP) * count / highest), width, f"{text}: {count:,}")
        for x, width, text, count in places
        if count
    ]
    ticks = [Tick(LEFT + (_FIRST - _GAP) / 2, "exact")]
    for decade in range(2 - DECADES, 1, 2):  # the first one would run into the word beside it
        ticks.append(Tick(start + (decade + DECADES) * PARTS * step, power(decade)))
    within = deviation.exact + sum(deviation.counts[: PARTS * (DECADES - 1)])
    summary = (
        f"Of {deviation.numbers:,} numbers compared, {deviation.exact / numbers:.1%} are exact and "
        f"{within / numbers:.1%} are off by at most a tenth of what is allowed."
    )
    if deviation.undefined:
        summary += f" {deviation.undefined:,} more are NaN, as the reference is."
    return Histogram(tuple(bars), tuple(ticks), f"{highest / numbers:.0%}", summary)


def draw_scatter(deviation: Deviation, *, from_grid: bool) -> Scatter:
    """Place the dots of a runtime.

    Args:
        deviation: The runtime's.
        from_grid: Whether the distance is that from a grid, in its widths.
    """
    distance, error = deviation.distance, deviation.error
    far = distance > 0
    low, high = _decades(distance[far].tolist(), (-3, 3))
    start = LEFT + (_FIRST if from_grid or not far.all() else 0)
    with np.errstate(divide="ignore"):
        exponent = np.log10(np.where(far, distance, 1))
        across = start + _share(exponent, low, high) * (RIGHT - start)
        # Those within the grid lie side by side, in the order in which they were tried.
        near = np.cumsum(~far) / max(1, int((~far).sum()))
        x = np.where(far, across, LEFT + near * (_FIRST - _GAP))
        wrong = error > 0
        bottom, top = _decades(error[wrong].tolist(), (-8, -6))
        up = np.log10(np.where(wrong, error, 1))
        floor = BOTTOM - 16
        y = np.where(wrong, floor - _share(up, bottom, top) * (floor - TOP), BOTTOM)
    dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True))
    ticks = [Tick(LEFT + (_FIRST - _GAP) / 2, "inside")] if start > LEFT and from_grid else []
    every = max(1, math.ceil((high - low) / 5))
    for i in range(low, high + 1, every):
        place = start + (i - low) / (high - low) * (RIGHT - start)
        if from_grid and place < start + _FIRST / 2:
            continue  # its number would run into the word beside it
        ticks.append(Tick(place, power(i)))
    skip = max(1, math.ceil((top - bottom) / 4))
    heights = [
        Tick(floor - (i - bottom) / (top - bottom) * (floor - TOP), power(i))
        for i in range(top, bottom - 1, -skip)
    ]
    where = "within the grid" if from_grid else "with inputs of nothing"
    summary = (
        f"{len(distance):,} probes. Largest error {where}: {_largest(error[~far])}; "
        f"{'outside of it' if from_grid else 'with others'}: {_largest(error[far])}."
    )
    divide = start - _GAP / 2 if start > LEFT else None
    return Scatter(dots, tuple(ticks), (Tick(BOTTOM, "0"), *heights), divide, summary)


def _largest(values: NDArray[np.float64]) -> str:
    return f"{values.max():.1e}" if values.size else "none tried"


def _share(exponent: NDArray[np.float64], low: int, high: int) -> NDArray[np.float64]:
    """Say how far between two powers of ten others lie; what is beyond is at the end."""
    return np.clip((exponent - low) / (high - low), 0.0, 1.0)


def _decades(values: Sequence[float], otherwise: tuple[int, int]) -> tuple[int, int]:
    """Find whole powers of ten around some positive numbers."""
    told = [value for value in values if value >= _LOWEST and math.isfinite(value)]
    if not told:
        return otherwise
    low, high = math.floor(math.log10(min(told))), math.ceil(math.log10(max(told)))
    return low, max(high, low + 1)


def _share_of_allowed(exponent: float) -> str:
    return f"{100 * 10**exponent:.2g} %"
