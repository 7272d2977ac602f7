"""The table that `make test-chaos` ends with: each fault, over each way, and what clients saw."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.chaos.load import Tally

HEAD = ("fault", "way", "requests", "wrong", "failed", "well again after, s", "slowest, s")


@dataclass(frozen=True)
class Row:
    """A fault, over a way."""

    fault: str
    way: str
    tally: Tally

    @property
    def cells(self) -> tuple[str, ...]:
        tally = self.tally
        failed = ", ".join(f"{n} {code}" for code, n in tally.failed.items()) or "0"
        return (
            self.fault,
            self.way,
            f"{tally.requests:,}",
            str(tally.wrong),
            failed,
            f"{tally.recovered_s:.2f}",
            f"{tally.slowest_s:.2f}",
        )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table that is also readable as it is."""
    table = [HEAD, *(row.cells for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    lines = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in table
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write them as chaos.md and chaos.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chaos.md").write_text(markdown(rows) + "\n")
    (folder / "chaos.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
