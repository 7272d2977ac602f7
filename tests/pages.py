"""The pages of the documentation, and what in them is to be run.

A fence of `sh` or `python` is run, in the order of its page. One with a title is a file of that
name. What cannot be run here is marked, where nobody sees it, by a comment on the line before:
`<!-- not run: REASON -->`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_NOT_RUN = re.compile(r"<!-- not run: (.*) -->")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fence.

    Attributes:
        page: Its page, from the root of the repository.
        line: Of the page, of its first line.
        language: What it is said to be; empty for what a program prints.
        title: The file that it is, if it is one.
        not_run: Why it cannot be run here.
        text: What is in it.
    """

    page: str
    line: int
    language: str
    title: str | None
    not_run: str | None
    text: str

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "python") and self.not_run is None and self.title is None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Find the fences of a page."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    found = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type != "fence" or token.map is None:
            continue
        language, _, rest = token.info.partition(" ")
        title = _TITLE.search(rest)
        mark = _NOT_RUN.fullmatch(before.content.strip()) if before is not None else None
        found.append(
            Block(
                page=str(page.relative_to(ROOT)),
                line=token.map[0] + 2,
                language=language,
                title=title and title[1],
                not_run=mark and mark[1],
                text=token.content,
            )
        )
    return found


def commands(block: Block) -> list[list[str]]:
    """Split a block of `sh` into commands of words, without comments; quotes stay with words."""
    text = re.sub(r"\\\n", " ", block.text)
    text = re.sub(r"(?m)(^|\s)#.*$", "", text)
    parts = re.split(r"\n|&&|\|\||[|;]", text)
    return [part.split() for part in parts if part.strip()]
