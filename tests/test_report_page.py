"""report.html as people see it: in headless Chromium, and as a file that asks for nothing."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import matplotlib.image as mpimg
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from export import export_checkpoint
from export.report import Report
from kan_bundle.integrity import record_file
from kan_bundle.manifest import read_manifest
from kan_model import KANLinear
from tests.browsing import TRAP, contrast, draw_all, opened, shown
from tests.conftest import GOLDENS, ROOT, STATE_DICTS, Golden, Shared
from tests.layers import golden_layers, phi
from tests.servers import served

AXE = ROOT / "tests" / "node" / "node_modules" / "axe-core" / "axe.min.js"
UNIFORM = STATE_DICTS[0]
NAME = "digits"
PHONE = {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def sampled(shared: Shared) -> Path:
    """Versions of one checkpoint: 1 in int8, 2 as it is, with samples, timed; some are outside."""
    return shared("sampled", _export_sampled) / "models" / NAME


def _export_sampled(root: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.6, (400, 4)).astype(np.float32)
    x[:, 2] *= 0.05
    source = root / f"{TRAP}.pt"
    source.write_bytes(UNIFORM.checkpoint.read_bytes())
    for precision in ("int8", "fp32"):
        export_checkpoint(
            source,
            output=root / "models",
            name=NAME,
            activation="silu",
            samples=x,
            precision=precision,
            benchmark=precision == "fp32",
            report=Report.silent(),
        )


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def read_back(picture: dict[str, str], kind: str) -> tuple[np.ndarray, np.ndarray, float]:
    """What a drawn curve says: x, values, and how much of a value its last digit is."""
    places = np.array(numbers_in(picture[kind])).reshape(-1, 2)
    (x0, x1, left, right), (low, high, bottom, top) = (
        [float(part) for part in picture[axis].split()] for axis in ("x", "y")
    )
    x = x0 + (places[:, 0] - left) / (right - left) * (x1 - x0)
    y = low + (places[:, 1] - bottom) / (top - bottom) * (high - low)
    return x, y, 0.005 * (high - low) / abs(top - bottom)


PICTURES = """(nodes) => nodes.map((node) => ({
    label: node.getAttribute("aria-label"), x: node.dataset.x, y: node.dataset.y,
    ...Object.fromEntries(["base", "spline", "total"].map(
        (kind) => [kind, node.querySelector(`.curve.${kind}`).getAttribute("d")])),
}))"""


def test_drawn_curves_are_the_models_numbers(
    browser: Browser, repository: Path, golden: Golden
) -> None:
    with shown(browser, repository / golden.name / "1" / "report.html") as page:
        draw_all(page)
        for number, layer in enumerate(golden_layers(golden)):
            drawn = page.locator(f".layer[data-layer='{number}'] .edge svg")
            pictures = drawn.evaluate_all(PICTURES)
            assert len(pictures) == min(25, layer.in_features * layer.out_features)
            for picture in pictures[:: len(pictures) - 1]:
                feature, output = map(int, numbers_in(picture["label"])[:2])
                for kind in ("base", "spline", "total"):
                    _, y, digit = read_back(picture, kind)
                    x = exact_points(layer, feature, len(y))
                    base, spline = np.array(
                        [phi(layer, feature, output, v, golden.activation) for v in x[:-1]]
                    ).T
                    expected = {"base": base, "spline": spline, "total": base + spline}[kind]
                    size = np.abs(base).max() + np.abs(spline).max()
                    # Half the last digit drawn, and that the page holds float32.
                    assert np.abs(y[:-1] - expected).max() <= digit + 1e-6 * size


def exact_points(layer: KANLinear, feature: int, count: int) -> np.ndarray:
    """Where curves are drawn: each interval between two knots in equal parts."""
    knots = layer.grid[feature].double().numpy()
    parts = count // (len(knots) - 1)
    return np.concatenate([np.linspace(a, b, parts) for a, b in pairwise(knots)])


def test_the_verdict_and_the_tables_need_no_script(browser: Browser, sampled: Path) -> None:
    manifest = read_manifest(sampled / "2")
    with shown(browser, sampled / "2" / "report.html", java_script_enabled=False) as page:
        expect(page.locator(".word")).to_have_text("Equal")
        expect(page.locator(".verdict")).to_contain_text(
            f"computes what {TRAP}.pt computes: at {manifest.parity[0].probes:,} inputs"
        )
        rows = page.get_by_role("region", name="Parity of each runtime").get_by_role("rowheader")
        expect(rows).to_have_text([record.runtime for record in manifest.parity])
        speeds = page.get_by_role("region", name="Speed of each runtime")
        expect(speeds.get_by_role("rowheader")).to_have_text(
            [record.runtime for record in manifest.parity]
        )
        expect(speeds.get_by_role("columnheader")).to_have_text(
            ["Runtime", "1 row", "16 rows", "256 rows", "1,024 rows", "Rows a second, at most"]
        )
        versions = page.get_by_role("region", name="Versions by precision").get_by_role("row")
        expect(versions).to_have_count(3)
        expect(versions.nth(1)).to_contain_text("int8")
        expect(versions.nth(2)).to_contain_text("2 (this)fp32")
        expect(page.locator("noscript p").first).to_be_visible()
        expect(page.locator(".diagram .edge")).to_have_count(16 + 16)


def test_an_approximation_says_what_it_is_equal_to(browser: Browser, sampled: Path) -> None:
    with shown(browser, sampled / "1" / "report.html") as page:
        expect(page.locator(".word")).to_have_text("Equal")
        expect(page.locator(".verdict")).to_contain_text("with weights in int8")
        expect(page.locator("#speed + .card")).to_contain_text("--benchmark")


def test_the_worst_probe_is_there_with_its_input(browser: Browser, sampled: Path) -> None:
    manifest = read_manifest(sampled / "2")
    with shown(browser, sampled / "2" / "report.html") as page:
        for record in manifest.parity:
            card = page.get_by_role("article", name=record.runtime, exact=True)
            expect(card.locator("summary")).to_contain_text(f"{100 * record.excess:.3g} % of")
            card.locator("summary").press("Enter")
            expect(card.locator("pre")).to_be_visible()
            assert len(card.locator("pre").inner_text().split(", ")) == 4


def test_histograms_count_every_number_that_was_compared(sampled: Path) -> None:
    manifest = read_manifest(sampled / "2")
    page = (sampled / "2" / "report.html").read_text()
    for record in manifest.parity:
        part = page.split(f">{record.runtime}</h3>")[1].split("</svg>")[0]
        titles = re.findall(r"<title>.*?: ([\d,]+)</title>", part)
        counted = sum(int(title.replace(",", "")) for title in titles)
        (nan,) = re.findall(r"; ([\d,]+) that are NaN", part)
        assert counted + int(nan.replace(",", "")) == 3 * record.probes
        assert int(nan.replace(",", "")) > 0


def test_edges_can_be_searched_and_turned_by_keyboard(browser: Browser, sampled: Path) -> None:
    with shown(browser, sampled / "2" / "report.html") as page:
        draw_all(page)
        section = page.locator(".layer").first
        captions = section.locator(".edge figcaption span:first-child")
        told = section.get_by_role("status")
        expect(captions).to_have_count(25)
        expect(told).to_have_text("1 to 25 of 32")
        importances = [
            float(text) for text in section.locator(".edge figcaption .note").all_inner_texts()
        ]
        assert importances == sorted(importances, reverse=True)
        section.get_by_role("button", name="Next").press("Enter")
        expect(told).to_have_text("26 to 32 of 32")
        expect(section.get_by_role("button", name="Next")).to_be_disabled()
        section.get_by_label("Input", exact=True).fill("2")
        expect(captions).to_have_count(8)
        section.get_by_label("Output", exact=True).fill("5")
        expect(captions).to_have_text(["2 → 5"])
        before = section.locator(".edge svg").get_attribute("data-y")
        section.get_by_label("Output", exact=True).fill("")
        expect(captions).to_have_count(8)
        section.get_by_label("same height").press("Space")
        assert section.locator(".edge svg").last.get_attribute("data-y") != before
        section.get_by_label("Output", exact=True).fill("99")
        expect(section.locator(".edges")).to_have_text("There is no such edge.")
        expect(told).to_have_text("none")


def test_samples_are_counted_on_the_grid_and_beside_it(browser: Browser, sampled: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.6, (400, 4)).astype(np.float32)
    x[:, 2] *= 0.05
    outside = (np.abs(x) > 1).mean(axis=0)
    with shown(browser, sampled / "2" / "report.html") as page:
        draw_all(page)
        box = page.locator("details.inputs").first
        box.get_by_role("combobox").select_option("number")
        rows = box.locator("tbody tr")
        expect(rows).to_have_count(4)
        for number, row in enumerate(rows.all()):
            cells = row.get_by_role("cell").all_inner_texts()
            assert cells[:2] == ["-1", "1"]
            assert numbers_in(cells[5]) == [pytest.approx(100 * outside[number], rel=6e-3)]
        shares = [numbers_in(row.get_by_role("cell").last.inner_text())[0] for row in rows.all()]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        box.get_by_role("combobox").select_option("outside")
        expect(rows.first.get_by_role("rowheader")).to_have_text(str(int(np.argmax(outside))))
        attention = page.get_by_role("region", name="Needs attention")
        share = f"{100 * (np.abs(x) > 1).mean():.3g} %"
        expect(attention).to_contain_text(f"{share} of the values that reach layers.0")


def test_names_from_outside_are_never_html(browser: Browser, sampled: Path) -> None:
    with shown(browser, sampled / "2" / "report.html") as page:
        draw_all(page)
        expect(page.locator("header dd").first).to_contain_text(TRAP)
        expect(page.locator("img")).to_have_count(0)
        assert page.evaluate("name") == ""


class Outside(HTMLParser):
    """Collects whatever a page would ask for, and inline handlers and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            asks = name in ("src", "href", "srcset", "action", "data", "poster")
            if name == "style" or name.startswith("on") or (asks and (value or "")[:1] != "#"):
                self.found.append(f"{tag} {name}={value}")


def test_the_page_is_one_file_that_allows_its_own_script_alone(repository: Path) -> None:
    text = (repository / UNIFORM.name / "1" / "report.html").read_text()
    outside = Outside()
    outside.feed(text)
    assert not outside.found
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{digest}&#39;" in policy
    assert policy.startswith("default-src &#39;none&#39;;")


def test_the_report_is_listed_in_the_manifest(repository: Path, golden: Golden) -> None:
    folder = repository / golden.name / "1"
    manifest = read_manifest(folder)
    assert manifest.files["report.html"] == record_file(folder / "report.html")
    assert list(manifest.files) == sorted(manifest.files)


def test_the_server_shows_it_and_it_draws_there(browser: Browser, repository: Path) -> None:
    with served(repository) as (server, _), opened(browser) as page:
        page.goto(f"http://{server.metrics_address}/reports/{UNIFORM.name}/1")
        draw_all(page)
        expect(page.locator(".layer").first.locator(".edge")).to_have_count(25)
        assert page.evaluate("self.origin") == "null"


def test_a_report_that_fails_does_not_stop_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(told: object) -> str:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr("export.pipeline.render_page", fail)
    with pytest.warns(UserWarning, match="report.html could not be made: ZeroDivisionError: odd"):
        manifest = export_checkpoint(
            GOLDENS / "uniform_4x8x3.pt", output=tmp_path, activation="silu"
        )
    assert "report.html" not in manifest.files
    assert read_manifest(tmp_path / "uniform_4x8x3" / "1") == manifest


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_light_and_dark(
    browser: Browser, sampled: Path, scheme: str
) -> None:
    with shown(browser, sampled / "2" / "report.html", color_scheme=scheme) as page:
        colours = page.evaluate(
            """() => {
                const probe = document.body.appendChild(document.createElement("i"));
                const names = ["page", "card", "ink", "quiet", "link", "good", "ready", "bad",
                               "orange", "axis", "margin"];
                return Object.fromEntries(names.map((name) => {
                    probe.style.color = `var(--${name})`;
                    return [name, getComputedStyle(probe).color];
                }));
            }"""
        )
    for ground in ("page", "card"):
        for text in ("ink", "quiet", "link"):
            assert contrast(colours[text], colours[ground]) >= 4.5, text
    for mark in ("good", "ready", "bad", "orange", "axis"):
        assert contrast(colours[mark], colours["card"]) >= 3, mark  # WCAG's, for what is no text
    for mark in ("good", "orange", "quiet"):
        assert contrast(colours[mark], colours["margin"]) >= 3, mark


def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    browser: Browser, sampled: Path
) -> None:
    size = {"width": 360, "height": 740}
    with shown(browser, sampled / "2" / "report.html", viewport=size) as page:
        draw_all(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


TOP = "(id) => document.getElementById(id).getBoundingClientRect().top"
AT_THE_END = "innerHeight + scrollY >= document.documentElement.scrollHeight - 2"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("place", ["edges", "layer-1", "inputs", "precision"])
def test_a_link_to_a_section_leads_to_its_heading(
    browser: Browser, sampled: Path, width: int, place: str
) -> None:
    file = sampled / "2" / "report.html"
    arrived = f"({TOP})('{place}') >= -1 && (({TOP})('{place}') < 60 || ({AT_THE_END}))"
    with opened(browser, viewport={"width": width, "height": 800}) as page:
        page.goto(file.as_uri())
        if place != "layer-1":  # which no link of the page leads to
            page.locator(f"nav a[href='#{place}']").click()
        else:
            page.evaluate("location.hash = 'layer-1'")
        draw_what_is_near(page)
        assert page.evaluate(arrived)
    with opened(browser, viewport={"width": width, "height": 800}) as page:
        page.goto(f"{file.as_uri()}#{place}")
        draw_what_is_near(page)
        assert page.evaluate(arrived)


def draw_what_is_near(page: Page) -> None:
    """Wait until what an observer draws when a place is reached has been drawn."""
    page.evaluate(
        """() => new Promise((done) => {
            let frames = 0;
            const next = () => (++frames < 10 ? requestAnimationFrame(next) : done());
            next();
        })"""
    )


def test_the_verdict_and_the_share_are_seen_on_a_phone(browser: Browser, sampled: Path) -> None:
    with shown(browser, sampled / "2" / "report.html", viewport=PHONE) as page:
        table = page.get_by_role("region", name="Parity of each runtime")
        edge = table.bounding_box()
        assert edge is not None
        for name in ("Verdict", "Of allowed"):
            box = table.get_by_role("columnheader", name=name).bounding_box()
            assert box is not None
            assert box["x"] + box["width"] <= edge["x"] + edge["width"]


def test_an_edge_behind_which_there_is_more_is_shaded(browser: Browser, sampled: Path) -> None:
    with shown(browser, sampled / "2" / "report.html", viewport=PHONE) as page:
        for name in ("Parity of each runtime", "Diagram of the network"):
            region = page.get_by_role("region", name=name)
            assert region.evaluate("(node) => node.scrollWidth > node.clientWidth")
            region.evaluate("(node) => { node.scrollLeft = 0 }")
            before = region.screenshot()
            region.evaluate("(node) => { node.scrollLeft = node.scrollWidth }")
            assert shades(before) == (False, True)
            assert shades(region.screenshot()) == (True, False)


def shades(picture: bytes) -> tuple[bool, bool]:
    """Whether the left and the right edge are darker than what is next to them, in a light page."""
    pixels = mpimg.imread(io.BytesIO(picture))[3, :, :3].mean(axis=1)
    width = len(pixels)
    return bool(pixels[4] < pixels[30] - 0.05), bool(pixels[width - 5] < pixels[width - 31] - 0.05)


@pytest.mark.skipif(not AXE.exists(), reason="`make test` finds no node and npm for axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing(browser: Browser, sampled: Path, scheme: str, width: int) -> None:
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    # The page itself would not run a script that is not its own.
    with opened(browser, bypass_csp=True, **options) as page:
        page.goto((sampled / "2" / "report.html").as_uri())
        draw_all(page)
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        page.add_script_tag(content=AXE.read_text())
        found = page.evaluate("axe.run().then((results) => results.violations)")
    assert not found, json.dumps(
        [(v["id"], v["impact"], [n["html"][:200] for n in v["nodes"][:3]]) for v in found], indent=1
    )
