"""Export every layout, one after the other, and print a table of what became of each.

`python -m tests.layouts [NAME ...] [--output DIR]`. It ends with 1 if a result is not the one that
the catalogue expects.
"""

import argparse
import sys
import tempfile
import traceback
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.layouts.catalogue import LAYOUTS
from tests.layouts.exporting import check, export_layout
from tests.layouts.layout import Layout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.layouts", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="layouts to export; default all")
    parser.add_argument("--output", type=Path, help="keep the bundles here")
    arguments = parser.parse_args()
    chosen = [layout for layout in LAYOUTS if layout.name in (arguments.names or [layout.name])]
    table = Table(
        "network", "verdict", "CPU s", "layers", "error", "warnings", "leaked", "refusal, remedy"
    )
    console, progress = Console(width=200), Console(stderr=True)
    faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for place, layout in enumerate(chosen, 1):
            progress.print(f"{place}/{len(chosen)} {layout.name}", end=" ")
            for step in (layout, layout.remedy):
                if step is None:
                    continue
                faults += _add(table, progress, step, folder)
    console.print(table)
    console.print(f"{len(chosen)} networks, {faults} not as expected")
    return 1 if faults else 0


def _add(table: Table, progress: Console, layout: Layout, folder: Path) -> bool:
    """Export one, and add its row.

    Returns:
        Whether the result is another than the catalogue expects.
    """
    try:
        outcome = export_layout(layout, folder)
    except Exception as error:  # what must not happen is what is looked for
        progress.print(f"TRACEBACK {type(error).__name__}: {error}", markup=False)
        lines = "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
        table.add_row(layout.name, "[red]traceback", "", "", "", "", "", lines)
        return True
    fault = check(layout, outcome)
    verdict = "exported" if outcome.manifest else "refused"
    progress.print(f"{verdict} in {outcome.cpu_s:.1f} s {fault or ''}", markup=False)
    for line in (*outcome.warnings, *sorted({*outcome.leaked}), outcome.refusal or ""):
        progress.print(f"    {line}", markup=False, style="dim") if line else None
    layers = len(outcome.manifest.layers) if outcome.manifest else 0
    table.add_row(
        layout.name,
        verdict if fault is None else f"[red]{verdict}",
        f"{outcome.cpu_s:.1f}",
        f"{layers}/{layout.layers}",
        f"{outcome.error:.1e}",
        str(len(outcome.warnings)),
        str(len(outcome.leaked)),
        outcome.refusal or "",
    )
    return fault is not None


if __name__ == "__main__":
    sys.exit(main())
