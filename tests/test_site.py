"""The documentation as a site: built without a warning, and read without a network."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.conftest import ROOT, Shared
from tests.pages import PAGES

BUILD_S = 300
BESIDE = ("SECURITY", "CHANGELOG", "CONTRIBUTING")


@pytest.fixture(scope="module")
def site(shared: Shared) -> Path:
    """The site, built as `make docs` does; every link and every anchor leads somewhere."""
    return shared("site", _build)


def _build(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=BUILD_S,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr  # with --quiet strict would see none


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and tells nobody."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site behind a web server."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def pages(site: Path) -> list[str]:
    return sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))


def test_every_page_is_there(site: Path) -> None:
    expected = {str(p.relative_to(ROOT / "docs").with_suffix(".html")) for p in PAGES[1:]}
    assert expected | {f"repository/{name}.html" for name in BESIDE} <= set(pages(site))


def test_every_public_name_has_its_reference(site: Path) -> None:
    for module, page in (
        ("kan_model", "kan_model"),
        ("export", "export"),
        ("serving.client", "client"),
    ):
        text = (site / "reference" / f"{page}.html").read_text()
        names = __import__(module, fromlist=["__all__"]).__all__
        assert names
        missing = [name for name in names if not re.search(rf'id="[\w.]+\.{name}"', text)]
        assert missing == []


def test_no_page_asks_anybody_else_or_is_wider_than_a_phone(
    site: Path, address: str, browser: Browser
) -> None:
    asked: list[str] = []
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda said: asked.append(f"console: {said.text}"))
    for name in pages(site):
        page.goto(f"{address}/{name}", wait_until="load")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    page.close()
    assert len(asked) > len(pages(site))
    others = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert others == []


ROOM_OF_COMMANDS = """() => {
    const found = [], word = document.createRange();
    const blocks = ":is(.language-sh, .language-python) > pre > code";
    for (const code of document.querySelectorAll(blocks)) {
        const nodes = document.createNodeIterator(code, NodeFilter.SHOW_TEXT);
        let used = 0;  // by words: spaces at the end of a line need no room
        for (let node; (node = nodes.nextNode());)
            for (const match of node.data.matchAll(/\\S+/g)) {
                word.setStart(node, match.index);
                word.setEnd(node, match.index + match[0].length);
                for (const rect of word.getClientRects()) used = Math.max(used, rect.right);
            }
        found.push(code.getBoundingClientRect().right - used);
    }
    return found;
}"""
"""Of every block, how far its text ends from its edge, in px."""


@pytest.mark.parametrize("width", [390, 1280])
def test_commands_are_read_whole_and_not_below_the_button(
    site: Path, address: str, browser: Browser, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844})
    rooms = {}
    for name in pages(site):
        if re.search(r'class="language-(sh|python) ', (site / name).read_text()):
            page.goto(f"{address}/{name}", wait_until="load")
            rooms[name] = page.evaluate(ROOM_OF_COMMANDS)
    page.close()
    assert sum(map(len, rooms.values())) > 60
    assert {name for name, found in rooms.items() if min(found) < 30} == set()  # the button's


def test_pages_are_read_from_a_folder_too(site: Path, browser: Browser) -> None:
    asked: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.get_by_role("link", name="tutorial", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Tutorial")
    page.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_formulas_are_drawn(address: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(f"{address}/mathematics.html")
    formulas = page.locator("math")
    expect(formulas.first).to_be_visible()
    assert formulas.count() > 8
    assert all(f.bounding_box()["height"] > 15 for f in formulas.all())  # type: ignore[index]
    page.close()


def test_a_word_is_found(address: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(f"{address}/index.html")
    page.locator("input[name=query]").click()
    page.keyboard.type("Schoenberg")
    found = page.locator(".md-search-result__link").first
    expect(found).to_have_attribute("href", re.compile("mathematics"), timeout=30_000)
    page.close()
