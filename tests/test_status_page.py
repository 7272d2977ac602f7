"""The status page as a browser shows it: headless Chromium, driven by playwright.

The clock of the page is the test's, so that a rate is a number and not a guess.
"""

import json
import math
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route, expect
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serving.errors import ModelNotFound
from serving.observability import exposition
from tests.browsing import contrast, luminance, opened
from tests.bundles import publish
from tests.conftest import STATE_DICTS
from tests.servers import WAIT_S, await_true, served
from tests.wire import raw_request

UNIFORM = STATE_DICTS[0]
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


class Awkward(Collector):
    """Names and numbers that a hasty parser gets wrong."""

    def __init__(self) -> None:
        chance = random.Random(0)
        signs = ["\\", '"', "\n", "n", "{", "}", ",", "=", "#", " ", "é", "\u2028", "\r", "\t", "a"]
        self.texts = ["".join(chance.choices(signs, k=chance.randrange(12))) for _ in range(200)]
        self.numbers = [0.0, -1.5, 1e-300, 1e22, 123456789.125, math.inf, -math.inf, math.nan]

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "awkward", "A \\ and\na #.", labels=["text", "other", "constructor"]
        )
        for i, text in enumerate(self.texts):
            family.add_metric([text, str(i), "p"], self.numbers[i % len(self.numbers)])
        yield family
        yield GaugeMetricFamily("without_labels", "x", value=3)
        yield GaugeMetricFamily("without_samples", "x", labels=["a"])


def test_the_parser_reads_what_prometheus_clients_own_reads(shown: Shown) -> None:
    registry = CollectorRegistry()
    registry.register(Awkward())
    text = generate_latest(registry).decode() + 'spaced { a = "b" , } 1e3 1700000000000\n\n'
    shown.open(READY)
    found = shown.page.evaluate(
        """async (text) => {
            const { parse } = await import("/prometheus.js");
            const { samples, families } = parse(text);
            const told = (one) => [one.name, [...one.labels], String(one.value)];
            return [samples.map(told), [...families]];
        }""",
        text,
    )
    expected = [
        (s.name, s.labels, s.value) for f in text_string_to_metric_families(text) for s in f.samples
    ]
    numbers = {"Infinity": math.inf, "-Infinity": -math.inf}
    read = [(name, dict(labels), float(numbers.get(v, v))) for name, labels, v in found[0]]
    assert len(read) == 202
    for one, other in zip(read, expected, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_equal(one[2], other[2])
    assert set(found[1]) == {"awkward", "without_labels", "without_samples"}


@pytest.mark.parametrize(
    "line",
    ["a", "a{", 'a{b="c} 1', 'a{b="c"d="e"} 1', "a one", "a 0x1p", "{} 1", "a 1 2 3", "a{b=c} 1"],
)
def test_what_is_no_sample_is_not_guessed_at(shown: Shown, line: str) -> None:
    shown.open(f"# HELP a b\n{line}\n")
    expect(shown.page.locator("#word")).to_have_text("Unreachable")
    expect(shown.page.locator("#summary")).to_contain_text("line 2 of the metrics is no sample")


def quantiles(shown: Shown, cases: list[tuple[float, list[tuple[str, float]]]]) -> list[float]:
    found = shown.page.evaluate(
        """async (cases) => {
            const { quantile } = await import("/prometheus.js");
            return cases.map(([q, buckets]) => String(quantile(q, new Map(buckets))));
        }""",
        cases,
    )
    return [float(text) for text in found]


def test_quantiles_lie_on_straight_lines_between_the_bounds_of_buckets(shown: Shown) -> None:
    shown.open(READY)
    chance = np.random.default_rng(0)
    cases, expected = [], []
    for q in (0.0, 0.01, 0.5, 0.9, 0.99, 1.0):
        bounds = np.cumsum(chance.uniform(0.001, 1, 12))
        counts = np.cumsum(chance.integers(1, 50, 12)).astype(float)
        buckets = [*zip(map(str, bounds), counts, strict=True), ("+Inf", counts[-1])]
        chance.shuffle(buckets)  # in whatever order they are told
        cases.append((q, [(le, float(count)) for le, count in buckets]))
        expected.append(np.interp(q * counts[-1], [0, *counts], [0, *bounds]))
    np.testing.assert_allclose(quantiles(shown, cases), expected, rtol=1e-12)


def test_quantiles_at_the_edges_are_those_of_prometheus(shown: Shown) -> None:
    """Each worked out by hand from the description of histogram_quantile."""
    shown.open(READY)
    cases: list[tuple[tuple[float, list[tuple[str, float]]], float]] = [
        ((0.5, [("1", 0), ("2", 10), ("+Inf", 10)]), 1.5),
        ((0.5, [("1", 5), ("2", 5), ("3", 10), ("+Inf", 10)]), 1.0),  # the first that reaches it
        ((0.99, [("1", 1), ("2", 1), ("+Inf", 10)]), 2.0),  # above all bounds
        ((0.5, [("-1", 10), ("1", 10), ("+Inf", 10)]), -1.0),  # no lower bound is known
        ((0.5, [("1", 4), ("2", 3), ("+Inf", 8)]), 1.0),  # a sum that is a little out of order
        ((0.5, [("1", 0), ("+Inf", 0)]), math.nan),
        ((0.5, [("1", 5), ("2", 10)]), math.nan),  # no +Inf
        ((0.5, [("+Inf", 10)]), math.nan),
        ((0.5, []), math.nan),
    ]
    np.testing.assert_equal(quantiles(shown, [case for case, _ in cases]), [e for _, e in cases])


def calls(**by_code: int) -> str:
    return "# TYPE kanserve_calls_total counter\n" + "".join(
        f'kanserve_calls_total{{code="{code}",method="ModelInfer"}} {number}\n'
        for code, number in by_code.items()
    )


def test_rates_are_what_was_added_over_the_time_it_took(shown: Shown) -> None:
    probes = 'kanserve_calls_total{code="OK",method="ServerReady"} %d\n'
    shown.open(READY + calls(OK=1000) + probes % 7)
    requests = shown.headline("Requests a second")
    expect(requests).to_have_text(DASH)  # nothing to compare with yet
    shown.tick(READY + calls(OK=1020) + probes % 9000)
    expect(requests).to_have_text("10")
    # A code is counted from its first call on.
    shown.tick(READY + calls(OK=1020, RESOURCE_EXHAUSTED=8))
    expect(requests).to_have_text("7")
    legend = shown.chart("Requests a second").locator("li")
    expect(legend).to_have_text(["OK5", "RESOURCE_EXHAUSTED2"])
    # The server was started again: what it counts now has come since.
    shown.tick(READY + calls(OK=32))
    expect(requests).to_have_text("10")
    # Ten seconds later nothing of that is left.
    for _ in range(5):
        shown.tick(READY + calls(OK=32))
    expect(requests).to_have_text("0")


def test_processes_are_added_up_but_not_what_each_tells_of_the_same_model(shown: Shown) -> None:
    def scrape(rows: tuple[int, ...]) -> str:
        return "# TYPE kanserve_queue_rows gauge\n" + "".join(
            state(1, "READY", worker=str(i))
            + f'kanserve_ready{{worker="{i}"}} 1\n'
            + f'kanserve_rows_total{{model="digits",worker="{i}"}} {n}\n'
            + f'kanserve_queue_rows{{model="digits",worker="{i}"}} 3\n'
            + 'kanserve_model_kan_layers{execution="fused",model="digits",version="1",'
            + f'worker="{i}"}} 2\n'
            for i, n in enumerate(rows)
        )

    shown.open(scrape((100, 200)))
    shown.tick(scrape((120, 240)))
    expect(shown.headline("Rows a second")).to_have_text("30")
    expect(shown.headline("Rows in queues")).to_have_text("6")
    expect(shown.page.locator("td[data-title='KAN layers']")).to_have_text("2 fused")
    expect(shown.page.locator("#summary")).to_contain_text("2 processes")
    # One does not answer in time, and does a moment later: that is no burst of requests.
    shown.tick(scrape((120,)))
    shown.tick(scrape((120, 240)))
    expect(shown.headline("Rows a second")).to_have_text("10")
    # One that is seen for the first time brings a past that is not of this minute.
    shown.tick(scrape((120, 240, 10_000)))
    expect(shown.headline("Rows a second")).to_have_text("7.5")
    shown.tick(scrape((120, 240, 10_000)) + 'kanserve_ready{worker="3"} 0\n')
    expect(shown.page.locator("#word")).to_have_text("Draining")


def test_request_times_come_from_the_buckets_of_all_models(shown: Shown) -> None:
    def scrape(*counts: int) -> str:
        return (
            READY
            + "# TYPE kanserve_request_seconds histogram\n"
            + "".join(
                f'kanserve_request_seconds_bucket{{le="{le}",model="{model}"}} {count}\n'
                for model in ("digits", "other")
                for le, count in zip(("0.001", "0.002", "+Inf"), counts, strict=True)
            )
        )

    shown.open(scrape(5, 5, 5))
    expect(shown.headline("Time of a request")).to_have_text(DASH)
    shown.tick(scrape(5, 105, 105))
    expect(shown.headline("Time of a request")).to_have_text("1.99 ms")
    legend = shown.chart("Time of a request").locator("li")
    expect(legend).to_have_text(["median1.5 ms", "99 %1.99 ms"])


def test_refusals_and_rows_outside_of_the_grid_have_charts(shown: Shown) -> None:
    def scrape(rows: int, outside: int, refused: str) -> str:
        return (
            READY
            + f'kanserve_rows_total{{model="digits"}} {rows}\n'
            + f'kanserve_out_of_grid_rows_total{{model="digits"}} {outside}\n'
            + f"# TYPE kanserve_refusals_total counter\n{refused}"
        )

    never = 'kanserve_refusals_total{reason="expired"} 0\n'
    shown.open(scrape(100, 10, never))
    expect(shown.headline("Refusals a second")).to_have_text(DASH)
    shown.tick(scrape(300, 12, never + 'kanserve_refusals_total{reason="shed"} 5\n'))
    expect(shown.headline("Refusals a second")).to_have_text("2.5")
    expect(shown.chart("Refusals a second").locator("li")).to_have_text(["shed2.5"])
    expect(shown.headline("Rows outside of the grid")).to_have_text("1 %")
    # Of the model since the server's start: 12 of 300.
    expect(shown.page.locator(".facts")).to_contain_text("4 %")
    image = shown.chart("Refusals a second").get_by_role("img")
    expect(image).to_have_accessible_name(
        "Refusals a second in the last five minutes: shed now 2.5, highest 2.5"
    )


def test_what_a_server_does_not_measure_is_not_shown_as_nothing(shown: Shown) -> None:
    shown.open(READY)
    shown.tick(READY)
    for title in ("Time of a request", "Rows in queues", "Refusals a second"):
        expect(shown.headline(title)).to_have_text("not measured here")


@pytest.mark.parametrize(
    ("metrics", "word"),
    [
        pytest.param(READY, "Ready", id="ready"),
        pytest.param("kanserve_ready 0\n" + state(1, "READY"), "Draining", id="draining"),
        pytest.param("kanserve_ready 0\n" + state(1, "LOADING"), "Not ready", id="loading"),
        pytest.param("kanserve_ready 0\n", "Not ready", id="empty"),
        pytest.param(state(1, "READY"), "Ready", id="not told"),
        pytest.param(None, "Unreachable", id="unreachable"),
    ],
)
def test_the_state_of_the_server_is_the_first_thing_said(
    shown: Shown, metrics: str | None, word: str
) -> None:
    shown.open(metrics)
    expect(shown.page.get_by_role("status")).to_have_text(word)
    expect(shown.page).to_have_title(f"{word} · kanserve {shown.address}")


def test_when_the_server_is_gone_the_last_values_stay_and_are_greyed(shown: Shown) -> None:
    shown.open(READY + calls(OK=0))
    shown.tick(READY + calls(OK=4))
    read_at = shown.time()
    shown.tick(None)
    shown.tick(None)
    page = shown.page
    expect(page.locator("#word")).to_have_text("Unreachable")
    expect(page.locator("#since")).to_have_text(f"since {read_at}")
    expect(page.locator("#summary")).to_have_text(
        f"what is shown was read at {read_at} · no connection · last tried at {shown.time()}"
    )
    expect(page.get_by_role("rowheader")).to_have_text("1")
    expect(shown.headline("Requests a second")).to_have_text("2")
    expect(page.locator("main")).to_have_css("filter", "grayscale(1)")
    shown.tick(READY + calls(OK=16))
    expect(page.locator("#word")).to_have_text("Ready")
    expect(shown.headline("Requests a second")).to_have_text("2")  # 16 in the 8 seconds


def test_how_often_it_reads_can_be_chosen(shown: Shown) -> None:
    shown.open(READY + calls(OK=0), "?every=30")
    expect(shown.page.locator("#every")).to_have_text("30 s")
    shown.tick(READY + calls(OK=60), 30)
    expect(shown.headline("Requests a second")).to_have_text("2")


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "NaN"])
def test_what_is_no_time_is_two_seconds(shown: Shown, text: str) -> None:
    shown.open(READY, f"?every={text}")
    expect(shown.page.locator("#every")).to_have_text("2 s")


def test_what_needs_attention_is_told_first_and_what_is_wanted_is_not(shown: Shown) -> None:
    shown.open(
        "kanserve_ready 1\n"
        + state(4, "READY", "its manifest cannot be read")
        + state(5, "UNAVAILABLE", "it failed its checks at load")
        + state(3, "UNAVAILABLE", "the version policy is latest:1")
        + state(2, "UNAVAILABLE", "the version policy is latest:1")
        + state(1, "UNAVAILABLE", "it was unloaded", model="other")
        + "kanserve_worker_deaths_total 2\n"
    )
    faults = shown.page.get_by_role("region", name="Needs attention").get_by_role("listitem")
    expect(faults).to_have_text(
        [
            "digits version 5 is not served: it failed its checks at load; version 4 serves",
            "digits version 4 serves, but what lies in its folder now does not: "
            "its manifest cannot be read",
            "2 processes ended and had to be started again, ever",
        ]
    )
    expect(shown.page.get_by_role("rowheader")).to_have_text(["5", "4"])
    expect(shown.page.locator(".versions .quiet")).to_have_text(
        [
            "Versions 3, 2 not served: the version policy is latest:1",
            "Version 1 not served: it was unloaded",
        ]
    )
    shown.tick(READY)
    expect(faults).to_have_count(0)


def test_a_version_that_was_pruned_says_so_where_its_layers_are(shown: Shown) -> None:
    layers = 'kanserve_model_kan_layers{execution="fused",model="digits",version="%d"} 2\n'
    info = 'kanserve_model_info{model="digits",prune_threshold="%s",sha256="",version="%d"} 1\n'
    shown.open(READY + layers % 1 + info % ("", 1) + layers % 2 + info % ("0.01", 2))
    cells = shown.page.locator("td[data-title='KAN layers']")
    expect(cells).to_have_text(["2 fusedpruned at 0.01", "2 fused"])


def test_text_from_models_is_never_taken_for_html_and_links_stay_here(shown: Shown) -> None:
    trap = "<img src=x onerror=document.title=1><script>document.title=2</script>"
    info = 'kanserve_model_info{model="%s",report="%s",sha256="",version="1"} 1\n'
    shown.open(
        "kanserve_ready 1\n"
        + state(1, "UNAVAILABLE", trap, model=trap)
        + state(1, trap, model="odd")
        + f'kanserve_model_nodes{{model="odd",provider="{trap}",version="1"}} 1\n'
        + info % (trap, "javascript:document.title=3")
        + info % ("odd", "//elsewhere.example/reports/odd/1")
        + state(1, "READY", model="good")
        + info % ("good", "/reports/good/1")
    )
    expect(shown.page.get_by_role("article").filter(has_text=trap)).to_have_count(2)
    assert shown.page.locator("img, article script").count() == 0
    expect(shown.page).to_have_title(f"Ready · kanserve {shown.address}")
    links = shown.page.locator("article a")
    expect(links).to_have_count(1)
    expect(links).to_have_accessible_name("Report of good, version 1")
    expect(links).to_have_attribute("href", "/reports/good/1")


def test_a_report_runs_its_script_and_reaches_nothing(browser: Browser) -> None:
    """Its own script draws; another's, in its place, finds no server, no page and no storage."""
    content = b"""<!doctype html><title>report</title><style>p { color: rgb(1, 2, 3) }</style>
    <p></p>
    <img src="/status.svg"><script>
    const tried = {};
    const attempt = async (name, act) => {
      try { tried[name] = String(await act()); } catch (error) { tried[name] = "refused"; }
    };
    (async () => {
      await attempt("fetch", () => fetch("/metrics").then((answer) => answer.text()));
      await attempt("elsewhere", () => fetch("data:,x").then((answer) => answer.text()));
      await attempt("storage", () => localStorage.length);
      await attempt("cookie", () => document.cookie);
      await attempt("window", () => { if (!open("/")) throw 1; });
      await attempt("module", () => import("/words.js"));
      await attempt("worker", () => { new Worker("/words.js"); });
      document.querySelector("p").textContent = JSON.stringify(tried);
    })();
    </script>"""
    asked: list[str] = []
    with (
        exposition.served(CollectorRegistry(), lambda *_: content, "127.0.0.1", 0) as address,
        browser.new_context() as context,
    ):
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://{address}/reports/digits/1")
        expect(page.locator("p")).to_have_css("color", "rgb(1, 2, 3)")
        expect(page.locator("p")).to_contain_text("worker")
        tried = json.loads(page.locator("p").inner_text())
        names = ("fetch", "elsewhere", "storage", "cookie", "window", "module", "worker")
        assert tried == dict.fromkeys(names, "refused")
        assert page.evaluate("self.origin") == "null"  # it could not even read the status page
        assert page.evaluate("document.querySelector('img').naturalWidth") == 0
        assert len(context.pages) == 1


def calls_of(address: str) -> float:
    """Inferences that a server has counted."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "kanserve_calls_total" and sample.labels["method"] == "ModelInfer"
    )


def test_it_shows_a_real_server_and_what_that_does(
    browser: Browser, repository: Path, tmp_path: Path
) -> None:
    for version in (1, 2):
        publish(repository / UNIFORM.name / "1", tmp_path / UNIFORM.name, version)
    (tmp_path / UNIFORM.name / "2" / "model.onnx").write_bytes(b"damaged")
    with served(tmp_path) as (server, stub), opened(browser) as page:
        stop_clock(page)
        page.goto(f"http://{server.metrics_address}/")
        expect(page.get_by_role("status")).to_have_text("Ready")
        expect(page.get_by_role("region", name="Needs attention")).to_contain_text(
            "version 2 is not served: it failed its checks at load; the server's log says more; "
            "version 1 serves"
        )
        row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="1"))
        expect(row.locator("[data-title='State']")).to_have_text("Ready")
        expect(row.locator("[data-title='KAN layers']")).to_have_text("2 fused")
        expect(row.locator("[data-title='Graph nodes run on']")).to_contain_text("on CPU")
        expect(row.locator("summary")).to_contain_text("% of allowed")
        for _ in range(6):
            stub.ModelInfer(raw_request(UNIFORM.x, UNIFORM.name))
        await_true(lambda: calls_of(server.metrics_address) == 6)  # counted after the answer
        page.clock.run_for(2000)
        requests = page.locator("figure", has_text="Requests a second")
        expect(requests.locator(".headline")).to_have_text("3")
        rows = page.locator("figure", has_text="Rows a second")
        expect(rows.locator(".headline")).to_have_text(f"{3 * len(UNIFORM.x):,}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_light_and_dark(
    browser: Browser, address: str, scheme: str
) -> None:
    with opened(browser, color_scheme=scheme) as page:
        Shown(page, address).open(READY)
        colours = page.evaluate(
            """() => {
                const probe = document.body.appendChild(document.createElement("i"));
                const names = ["page", "card", "ink", "quiet", "link", "good", "ready", "bad",
                               "orange", "purple", "sky", "grey"];
                return Object.fromEntries(names.map((name) => {
                    probe.style.color = `var(--${name})`;
                    return [name, getComputedStyle(probe).color];
                }));
            }"""
        )
    assert (luminance(colours["page"]) > 0.5) is (scheme == "light")
    for ground in ("page", "card"):
        for text in ("ink", "quiet", "link"):
            assert contrast(colours[text], colours[ground]) >= 4.5, text
    for mark in ("good", "ready", "bad", "orange", "purple", "sky", "grey"):
        assert contrast(colours[mark], colours["card"]) >= 3, mark  # WCAG's, for what is no text


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, address: str) -> None:
    long = "it-is-a-reason-without-any-place-to-break-it-" * 5
    with opened(browser, viewport={"width": 360, "height": 740}) as page:
        shown = Shown(page, address)
        shown.open(
            "kanserve_ready 1\n"
            + state(1, "READY")
            + state(2, "UNAVAILABLE", long, model="m" * 128)
        )
        expect(page.get_by_role("rowheader")).to_have_text(["1", "2"])
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        expect(page.get_by_role("table")).to_have_count(2)
        # What is not known takes no room; a row is a row to a screen reader all the same.
        expect(page.get_by_role("cell")).to_have_text(["Ready", f"Not served{long}"])
