"""SECURITY.md: a row for every claim, a test for every row."""

import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "SECURITY.md").read_text()
SITE = (ROOT / "docs" / "security.md").read_text()
HEADS = {
    "asset": ["asset", "who attacks", "what they can do", "what holds", "test"],
    "what": ["what", "why not in the server", "what does it", "test"],
}
LINK = re.compile(r"\[([^]]+)\]\(([^)]+)\)")


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables() -> dict[str, list[list[str]]]:
    found = {}
    for title, text in sections(PAGE).items():
        lines = [line for line in text.splitlines() if line.startswith("|")]
        if lines:
            found[title] = [cells(line) for line in lines]
    return found


ROWS = [(title, row) for title, lines in tables().items() for row in lines[2:]]


def test_there_is_a_table_for_each_side() -> None:
    for head, *_ in tables().values():
        assert head == HEADS[head[0]]
    assert len(tables()) >= 7
    assert len(ROWS) >= 40


@pytest.mark.parametrize(("title", "row"), ROWS, ids=[f"{t}: {r[:3]}" for t, r in ROWS])
def test_every_row_is_whole_and_names_tests_that_there_are(title: str, row: list[str]) -> None:
    head = tables()[title][0]
    assert len(row) == len(head)
    assert all(row), row
    links = LINK.findall(row[-1])
    assert links
    for name, target in links:
        assert target.startswith("tests/")
        path = ROOT / target
        assert path.is_dir() or (path.is_file() and path.name.startswith("test_"))
        assert path.stem in name


def test_every_section_of_the_site_leads_to_rows() -> None:
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in tables()}
    for title, text in sections(SITE).items():
        named = re.findall(r"\.\./SECURITY\.md#([\w-]+)", text)
        assert named, title
        assert set(named) <= anchors, title


def test_what_is_left_to_the_deployment_is_done_by_files_that_there_are() -> None:
    for row in tables()["What is left to the deployment"][2:]:
        for _, target in LINK.findall(row[2]):
            assert (ROOT / target).is_file(), target
