"""Pages in a browser: headless Chromium, driven by playwright. The fixture `browser` starts it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TRAP = "<img src=x onerror=name=1>"
"""A name that runs a script where it is taken for HTML."""


@contextmanager
def opened(browser: "Browser", **options: Any) -> "Iterator[Page]":
    """A page in a profile of its own, on which nothing may go wrong."""
    wrong: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda message: (
                wrong.append(message.text)
                if message.type == "error" and "net::ERR" not in message.text
                else None
            ),
        )
        page.set_default_timeout(30_000)
        yield page
    assert not wrong


@contextmanager
def shown(browser: "Browser", file: Path, **options: object) -> "Iterator[Page]":
    """A file, which may ask for nothing else."""
    with opened(browser, **options) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        yield page
        assert asked == [file.as_uri()]


def draw_all(page: "Page") -> None:
    """Have what a report draws when it comes near drawn now, as before printing."""
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function("!document.querySelector('.layer form[hidden]')")


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it, of `rgb(r, g, b)`."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, as WCAG 2.2 defines it: 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
