"""Numbers in words, as the terminal and the report write them.

This module knows neither of the two, and draws nothing.
"""

import math

from kan_bundle.manifest import Manifest

_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_LEAST_SHARE = 1e-5  # that is told

ROWS = {
    "samples": "rows of the samples",
    "grid": "random rows within the grid",
    "random": "random rows",
}
"""What a change was measured on, as `ChangeRecord.on` says."""


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
