"""What the terminal and the report say of the same numbers."""

import re
from pathlib import Path

from rich.console import Console

from export import tables
from kan_bundle.manifest import read_manifest
from tests.conftest import Golden


def test_the_terminal_and_the_report_tell_the_same_largest_error(
    repository: Path, golden: Golden
) -> None:
    """That of the files; eager, which may be further off, is none."""
    folder = repository / golden.name / "1"
    manifest = read_manifest(folder)
    files = [record.excess for record in manifest.parity if record.runtime != "eager"]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(tables.result(manifest, str(folder), 1.0))
    largest = f"{100 * max(files):.3g} %"
    told = f"in {len(files)} runtimes, at most {largest} of what is allowed"
    assert told in shown.get()
    told = f"in any of {len(files)} runtimes is {largest} of what is allowed"
    assert told in re.sub(r"\s+", " ", (folder / "report.html").read_text())
