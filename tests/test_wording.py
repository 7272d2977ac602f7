"""What the terminal and the report say of the same numbers."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from rich.console import Console

from export import export_module, tables
from export.report import Report
from export.wording import change_sentence, percent, seconds, size
from kan_bundle.manifest import ChangeRecord, read_manifest
from kan_model import KAN
from tests.browsing import shown as opened_page
from tests.conftest import STATE_DICTS, Golden


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


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_400, "999 kB"),
        (999_700, "1 MB"),
        (999_999_999, "1 GB"),
        (2_280_000_000_000, "2.28 TB"),
    ],
)
def test_a_size_has_three_digits_and_the_unit_that_suits_them(count: int, words: str) -> None:
    assert size(count) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "\N{EN DASH}"),
        (12.34, "12.3 s"),
        (0.9997, "1 s"),
        (0.9994, "999 ms"),
        (0.0009997, "1 ms"),
        (0.0000123, "12.3 \N{MICRO SIGN}s"),
    ],
)
def test_a_time_has_three_digits_and_the_unit_that_suits_them(
    value: float | None, words: str
) -> None:
    assert seconds(value) == words


SHARES = [
    (0.0, "0 %"),
    (1e-9, "<0.001 %"),
    (2e-5, "0.002 %"),
    (0.1154, "11.5 %"),
    (0.9994, "99.9 %"),
    (1 - 1 / 5200, "99.98 %"),
    (1 - 1e-9, "99.99 %"),
    (1.0, "100 %"),
    (1.25, "125 %"),
    (12.34, "1230 %"),
]


@pytest.mark.parametrize(("share", "words"), SHARES)
def test_less_than_all_never_reads_as_all(share: float, words: str) -> None:
    assert percent(share) == words


def test_the_pages_script_writes_shares_as_the_rest_does(
    browser: Browser, repository: Path
) -> None:
    with opened_page(browser, repository / STATE_DICTS[0].name / "1" / "report.html") as page:
        for share, words in SHARES:
            assert page.evaluate("percent", share) == words


CHANGE = ChangeRecord(
    on="samples", rows=397, largest=0.01951, typical=0.00652, size=1.25, same_argmax=1.0
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            CHANGE,
            "changes the outputs on 397 rows by at most 0.0195, typically 0.00652; same argmax on "
            "100 %; outputs are 1.25 in size",
        ),
        (
            replace(CHANGE, on="grid", rows=1024, same_argmax=None, size=0.0),
            "changes the outputs on 1,024 random rows within the grid by at most 0.0195, typically "
            "0.00652",
        ),
    ],
)
def test_a_change_is_told_in_one_sentence(change: ChangeRecord, words: str) -> None:
    assert change_sentence(change) == words


def test_what_fewer_bits_change_is_told_on_terminal_and_page(tmp_path: Path, quiet: Report) -> None:
    manifest = export_module(KAN([3, 2]), name="m", output=tmp_path, precision="fp16", report=quiet)
    assert manifest.approximation is not None
    change = change_sentence(manifest.approximation)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(tables.result(manifest, "models/m/1", 1.0))
    assert f"fp16        {change}" in shown.get()
    page = (tmp_path / "m" / "1" / "report.html").read_text()
    assert f"fp16, which {change}" in page
