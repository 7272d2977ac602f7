"""Numbers in words, as the terminal and the report write them.

This module knows neither of the two, and draws nothing.
"""

import math

from kan_bundle.manifest import ChangeRecord, Manifest
from kan_bundle.scores import ExpectedRecord, ScoreRecord

_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_LEAST_SHARE = 1e-5  # that is told

ROWS = {
    "samples": "rows of the samples",
    "grid": "random rows within the grid",
    "random": "random rows",
}
"""What a change was measured on, as `ChangeRecord.on` says."""


def change_sentence(change: ChangeRecord) -> str:
    """Say how far the answers of an approximation are from the checkpoint's."""
    where = "rows" if change.on == "samples" else ROWS[change.on]
    same = "" if change.same_argmax is None else f"; same argmax on {percent(change.same_argmax)}"
    size_of_outputs = f"; outputs are {change.size:.3g} in size" if change.size > 0 else ""
    return (
        f"changes the outputs on {change.rows:,} {where} by at most {change.largest:.3g}, "
        f"typically {change.typical:.3g}{same}{size_of_outputs}"
    )


def expected_sentence(expected: ExpectedRecord) -> str:
    """Say how close answers are to those expected."""
    return (
        f"answers as expected on {expected.rows:,} rows, off by at most {expected.largest:.2g} "
        f"where outputs are up to {expected.size:.3g}"
    )


def score_words(score: ScoreRecord) -> str:
    """Say how good answers are by targets."""
    if score.accuracy is not None:
        return f"accuracy {percent(score.accuracy)}"
    if score.rmse is None or score.mae is None:
        return "no row is answered with numbers"
    return f"RMSE {score.rmse:.4g}, MAE {score.mae:.4g}"


def largest_excess(manifest: Manifest) -> tuple[float, int]:
    """Tell how far off the files are at most.

    Eager is no file: it is the network itself in float32.

    Returns:
        The largest error in any runtime as a share of what is allowed, and how many runtimes.
    """
    records = [record for record in manifest.parity if record.runtime != "eager"]
    return max(record.excess for record in records), len(records)


def percent(share: float) -> str:
    """Write a share of 1; what is less than all of it never reads as all."""
    if 0 < share < _LEAST_SHARE:
        return f"<{100 * _LEAST_SHARE:g} %"
    shown = _rounded(100 * share)
    if share < 1 and shown == 100:
        return f"{math.floor(share * 10_000) / 100:.2f} %"
    return f"{shown:g} %"


def size(count: int) -> str:
    """Write a number of bytes."""
    value, units = float(count), iter(_UNITS)
    unit = next(units)
    for larger in units:
        if _rounded(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def seconds(value: float | None) -> str:
    """Write a time in seconds; a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if _rounded(value * factor * 1e3) >= 1000:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} \N{MICRO SIGN}s"


def _rounded(value: float) -> float:
    """Round as three digits do, which is what decides about the unit."""
    return float(f"{value:.3g}")
