"""The status page in a browser, with metrics that a test says itself.

The clock of the page is the test's, so that a rate is a number and not a guess.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect
from prometheus_client import CollectorRegistry

from serving.errors import ModelNotFound
from serving.observability import exposition
from tests.browsing import opened

DASH = "\N{EN DASH}"  # what is not known
START = 1_700_000_000  # seconds since 1970, for the clock of the page


def no_report(model: str, version: str) -> bytes:
    raise ModelNotFound("there is none")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The page without a server behind it: tests say themselves what /metrics tells."""
    with exposition.served(CollectorRegistry(), no_report, "127.0.0.1", 0) as address:
        yield address


def stop_clock(page: Page) -> None:
    """Have time pass in a page when a test says so, and not otherwise."""
    page.clock.install(time=START)  # from where it runs, so that it can only be stopped later
    page.clock.pause_at(START + 3600)


class Shown:
    """A page whose clock stands still but for `tick`, and whose metrics are the test's."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address
        self.metrics: str | None = ""
        stop_clock(page)
        page.route("**/metrics", self._answer)

    def _answer(self, route: Route) -> None:
        if self.metrics is None:
            route.abort("connectionrefused")
        else:
            route.fulfill(body=self.metrics, content_type="text/plain; version=0.0.4")

    def open(self, metrics: str | None, query: str = "") -> None:
        self.metrics = metrics
        self.page.goto(f"http://{self.address}/{query}")
        expect(self.page.locator("#word")).not_to_have_text("Connecting")

    def tick(self, metrics: str | None, seconds: int = 2) -> None:
        """Let some time pass, after which the page reads the metrics once more."""
        self.metrics = metrics
        self.page.clock.run_for(1000 * seconds)
        expect(self.page.locator("#summary")).to_contain_text(f"at {self.time()}")

    def time(self) -> str:
        """What the page's clock says."""
        now: str = self.page.evaluate("new Date().toLocaleTimeString('en-GB')")
        return now

    def chart(self, title: str) -> Any:
        return self.page.locator("figure", has=self.page.get_by_role("heading", name=title))

    def headline(self, title: str) -> Any:
        return self.chart(title).locator(".headline")


@pytest.fixture
def shown(browser: Browser, address: str) -> Iterator[Shown]:
    with opened(browser) as page:
        yield Shown(page, address)


def state(
    version: int, name: str, reason: str = "", model: str = "digits", worker: str = ""
) -> str:
    also = f',worker="{worker}"' if worker else ""
    return (
        f'kanserve_model_state{{model="{model}",reason="{reason}",state="{name}",'
        f'version="{version}"{also}}} 1.0\n'
    )


READY = "kanserve_ready 1.0\n" + state(1, "READY")


def calls(**by_code: int) -> str:
    return "# TYPE kanserve_calls_total counter\n" + "".join(
        f'kanserve_calls_total{{code="{code}",method="ModelInfer"}} {number}\n'
        for code, number in by_code.items()
    )
