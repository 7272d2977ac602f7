"""The numbers on the status page: metrics as they are read, added up and divided by time."""

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import expect
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from tests.status import DASH, READY, Shown, address, calls, shown, state

__all__ = ["address", "shown"]


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


def test_a_model_whose_grid_is_not_at_its_inputs_has_a_dash_and_no_share(shown: Shown) -> None:
    def scrape(rows: int, outside: str) -> str:
        conv = state(1, "READY", model="conv") + f'kanserve_rows_total{{model="conv"}} {rows}\n'
        return READY + conv + outside

    def digits(rows: int, outside: int) -> str:
        return (
            f'kanserve_rows_total{{model="digits"}} {rows}\n'
            f'kanserve_out_of_grid_rows_total{{model="digits"}} {outside}\n'
        )

    card = shown.page.locator("#model-conv .facts")
    shown.open(scrape(100, ""))
    shown.tick(scrape(300, ""))
    expect(card.locator("div", has_text="out of grid").locator("dd")).to_have_text(DASH)
    expect(shown.headline("Rows outside of the grid")).to_have_text(DASH)
    # Beside one that tells: a share of that one's rows alone.
    shown.tick(scrape(500, digits(100, 0)))
    shown.tick(scrape(9000, digits(200, 50)))
    expect(shown.headline("Rows outside of the grid")).to_have_text("25 %")
    expect(card.locator("div", has_text="out of grid").locator("dd")).to_have_text(DASH)


def test_what_a_server_does_not_measure_is_not_shown_as_nothing(shown: Shown) -> None:
    shown.open(READY)
    shown.tick(READY)
    for title in ("Time of a request", "Rows in queues", "Refusals a second"):
        expect(shown.headline(title)).to_have_text("not measured here")
