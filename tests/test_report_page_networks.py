"""report.html of networks of many kinds and sizes, each drawn in headless Chromium."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, expect
from torch import nn

from export.inputs import read_inputs
from export.network import describe_network
from export.report_page.rendering import Exported, render_page
from export.sparsity import prune_network
from kan_bundle.manifest import read_manifest
from kan_model import KAN, KANLinear
from tests import zoo
from tests.browsing import TRAP, draw_all, shown
from tests.conftest import STATE_DICTS

UNIFORM = STATE_DICTS[0]


def rendered(module: nn.Module, repository: Path, samples: np.ndarray | None = None) -> str:
    """The page of a network that nothing was measured of, with another's parity."""
    shape = None if samples is not None or isinstance(module, KAN) else 3
    network = describe_network(module.eval(), read_inputs(shape, samples))
    manifest = read_manifest(repository / UNIFORM.name / "1")
    layers = tuple(replace(manifest.layers[0], name=name) for name in network.layers)
    return render_page(Exported(replace(manifest, layers=layers), network, ()))


def test_a_pruned_version_is_not_called_the_checkpoint(
    browser: Browser, repository: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = describe_network(KAN([4, 6, 2]).eval(), None)
    network, written, pruning = prune_network(network, 0.3)
    zeroed = sum(layer.zeroed for layer in pruning.layers)
    manifest = read_manifest(repository / UNIFORM.name / "1")
    layers = tuple(replace(manifest.layers[0], name=name) for name in written.layers)
    manifest = replace(manifest, layers=layers, pruning=pruning)
    file = tmp_path / "report.html"
    file.write_text(render_page(Exported(manifest, network, ())))
    with shown(browser, file) as page:
        expect(page.locator(".verdict")).to_contain_text(
            f"computes what {UNIFORM.name}.pt computes without {zeroed} of 36 edges"
        )
        attention = page.get_by_role("region", name="Needs attention")
        expect(attention).to_contain_text(f"{zeroed} of 36 edges were left out")
        draw_all(page)
        last = page.locator(".layer").first.locator(".edge figcaption .note").last
        expect(last).to_have_text("0")


class Trapped(nn.Module):
    """Its layer's name is a script, and the end of one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module(TRAP, KANLinear(3, 2))
        self.add_module("</script><script>name=2</script>", KANLinear(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def test_names_of_layers_are_never_html(browser: Browser, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(rendered(Trapped(), repository))
    with shown(browser, file) as page:
        draw_all(page)
        headings = page.locator(".layer h3")
        expect(headings.first).to_contain_text(TRAP)
        expect(headings.last).to_contain_text("</script>")
        expect(page.locator("img")).to_have_count(0)
        assert page.locator("script").count() == 2
        assert page.evaluate("name") == ""


def test_a_large_model_stays_small_and_quick(
    browser: Browser, repository: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    file = tmp_path / "report.html"
    file.write_text(rendered(KAN([784, 64, 10]), repository))
    assert file.stat().st_size < 5_000_000
    with shown(browser, file) as page:
        draw_all(page)
        section = page.locator(".layer").first
        expect(section.get_by_role("status")).to_have_text("1 to 25 of 50,176")
        expect(section.locator(".edge")).to_have_count(25)
        section.get_by_label("Input", exact=True).fill("783")
        expect(section.get_by_role("status")).to_have_text("1 to 25 of 64")
        inputs = page.locator("details.inputs").first
        expect(inputs.get_by_role("status")).to_have_text("1 to 15 of 784")
        expect(page.locator(".diagram .node.input")).to_have_count(10)


@pytest.mark.parametrize(
    ("widths", "options"),
    [
        pytest.param([1, 1], {}, id="one edge"),
        pytest.param([2, 2], {"spline_order": 0, "grid_size": 1}, id="a staircase of one step"),
        pytest.param([100, 100], {}, id="10,000 edges"),
        pytest.param([400, 400], {"grid_size": 2}, id="more than there is room for"),
        pytest.param([2, 2], {"grid_size": 200}, id="a fine grid"),
        pytest.param([2] * 40, {}, id="many layers"),
    ],
)
def test_odd_shapes_have_a_page(
    browser: Browser,
    repository: Path,
    tmp_path: Path,
    widths: list[int],
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    file = tmp_path / "report.html"
    file.write_text(rendered(KAN(widths, **options), repository))
    assert file.stat().st_size < 5_000_000
    with shown(browser, file) as page:
        draw_all(page)
        expect(page.locator(".layer")).to_have_count(len(widths) - 1)
        assert page.locator(".edge svg").count() >= 1
        assert "NaN" not in page.locator("main").inner_html().replace("and NaN, each", "")


def test_weights_that_are_no_numbers_leave_gaps(
    browser: Browser, repository: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    kan = KAN([3, 3])
    network = describe_network(kan.eval(), None)
    with torch.no_grad():
        kan.layers[0].base_weight[0, 0] = float("nan")
        kan.layers[0].spline_weight[1, 1, 2] = float("inf")
    manifest = read_manifest(repository / UNIFORM.name / "1")
    layers = (replace(manifest.layers[0], name="layers.0"),)
    file = tmp_path / "report.html"
    file.write_text(render_page(Exported(replace(manifest, layers=layers), network, ())))
    with shown(browser, file) as page:
        draw_all(page)
        expect(page.locator(".edge svg")).to_have_count(9)


def test_layers_inside_a_network_have_sections_and_their_own_samples(
    browser: Browser, repository: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 3, 8, 8)).astype(np.float32)
    file = tmp_path / "report.html"
    file.write_text(rendered(zoo.conv_net(), repository, x))
    with shown(browser, file) as page:
        draw_all(page)
        expect(page.locator(".layer h3")).to_have_text([re.compile("fc1"), re.compile("fc2")])
        expect(page.locator(".diagram")).to_have_count(2)
        boxes = page.locator("details.inputs")
        expect(boxes).to_have_count(2)
        expect(boxes.first.locator("summary")).to_contain_text("50 rows of samples")


def test_a_network_without_a_kan_has_a_page(
    browser: Browser, repository: Path, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_text(rendered(nn.Linear(3, 2), repository))
    with shown(browser, file) as page:
        expect(page.locator("#structure + .card")).to_contain_text("no KANLinear layer")
        expect(page.locator(".layer")).to_have_count(0)
