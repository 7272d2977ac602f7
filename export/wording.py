"""Numbers in words, as the terminal and the report write them.

This module knows neither of the two, and draws nothing.
"""

from kan_bundle.manifest import Manifest


def largest_excess(manifest: Manifest) -> tuple[float, int]:
    """Tell how far off the files are at most.

    Eager is no file: it is the network itself in float32.

    Returns:
        The largest error in any runtime as a share of what is allowed, and how many runtimes.
    """
    records = [record for record in manifest.parity if record.runtime != "eager"]
    return max(record.excess for record in records), len(records)


def percent(share: float) -> str:
    """Write a share of 1."""
    return f"{100 * share:.3g} %"
