"""The status page as a browser shows it: headless Chromium, driven by playwright."""

import json
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from serving.observability import exposition
from tests.browsing import contrast, luminance, opened
from tests.bundles import publish
from tests.conftest import STATE_DICTS
from tests.servers import WAIT_S, await_true, served
from tests.status import READY, Shown, address, calls, shown, state, stop_clock
from tests.wire import raw_request

__all__ = ["address", "shown"]

UNIFORM = STATE_DICTS[0]


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


def test_a_version_with_rules_for_its_inputs_says_which_values_it_accepts(shown: Shown) -> None:
    info = 'kanserve_model_info{accepts="%s",model="digits",sha256="",version="%d"} 1\n'
    rules = "tokens in 0..49; x without NaN"
    shown.open(READY + state(2, "READY") + info % ("", 1) + info % (rules, 2))
    cells = shown.page.locator("td[data-title='State']")
    expect(cells).to_have_text([f"Readyaccepts {rules}", "Ready"])


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
