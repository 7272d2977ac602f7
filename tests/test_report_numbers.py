"""The numbers of report.html before they are drawn: counted and placed by hand here."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.inputs import read_inputs
from export.network import describe_network
from export.probes import Probes
from export.proof.parity import measure
from export.proof.reference import Reference
from export.reaching import reaching
from export.report_page import charts
from export.report_page.charts import draw_histogram, draw_scatter
from export.report_page.deviation import DECADES, PARTS, Deviation, describe_deviations
from export.report_page.distribution import BINS, distribute
from export.report_page.variants import find_variants
from export.tables import pruning_lines
from kan_bundle.layout import BundleFolder
from kan_bundle.manifest import (
    ChangeRecord,
    Precision,
    PrunedLayer,
    PruningRecord,
    Source,
    read_manifest,
    write_manifest,
)
from kan_model import KAN, KANLinear
from tests.conftest import STATE_DICTS


def deviation(**fields: object) -> Deviation:
    """Of a runtime of which nothing else is known."""
    known: dict[str, Any] = {
        "measurement": None,
        "exact": 0,
        "undefined": 0,
        "counts": (0,) * (DECADES * PARTS),
        "distance": np.zeros(0),
        "error": np.zeros(0),
        "worst": None,
    }
    return Deviation(**(known | fields))


def dots(path: str) -> np.ndarray:
    return np.array([[float(v) for v in dot] for dot in re.findall(r"M(\S+) (\S+)h0", path)])


# Where samples lie.


def test_values_are_counted_in_parts_of_the_grid_below_and_above_it() -> None:
    layer = KANLinear(2, 1, grid_range=(0, 24))
    with torch.no_grad():
        layer.grid[1] += 100
    rows = torch.tensor(
        [[-1.0, 100.5], [-0.1, 123.5], [0.5, 123.5], [2.5, 130.0], [2.6, torch.nan], [24.5, -7.0]]
    )
    found = distribute(layer, rows)
    assert BINS == 24
    assert np.flatnonzero(found.counts[0]).tolist() == [0, 2]
    assert found.counts[0, [0, 2]].tolist() == [1, 2]
    assert np.flatnonzero(found.counts[1]).tolist() == [0, 23]
    assert found.counts[1, [0, 23]].tolist() == [1, 2]
    assert (found.below.tolist(), found.above.tolist()) == ([2, 1], [1, 1])
    np.testing.assert_allclose(found.low, [-1, -7])
    np.testing.assert_allclose(found.high, [24.5, 130])
    np.testing.assert_allclose(found.outside, [3 / 6, 2 / 5])
    assert found.outside_in_all == pytest.approx(5 / 11)
    assert found.rows == 6


def test_what_reaches_each_layer_is_what_the_layers_before_it_answer() -> None:
    torch.manual_seed(0)
    kan = KAN([3, 5, 2]).eval()
    x = np.random.default_rng(0).normal(size=(150, 3)).astype(np.float32)
    found = reaching(describe_network(kan, read_inputs(None, x)), [x])
    assert list(found) == ["layers.0", "layers.1"]
    torch.testing.assert_close(found["layers.0"], torch.from_numpy(x))
    torch.testing.assert_close(found["layers.1"], kan.layers[0](torch.from_numpy(x)).detach())


def test_of_many_samples_some_are_taken_evenly() -> None:
    kan = KAN([1, 1]).eval()
    x = np.arange(5000, dtype=np.float32)[:, None] / 5000
    found = reaching(describe_network(kan, read_inputs(None, x)), [x])["layers.0"][:, 0]
    assert len(found) == 1024
    assert [float(found[0]), float(found[-1])] == [0, float(x[-1, 0])]
    steps = found.diff()
    assert float(steps.min()) > 0.8 / 1024
    assert float(steps.max()) < 1.3 / 1024


# The charts.


def test_bars_stand_where_their_share_of_what_is_allowed_is() -> None:
    counts = [0] * (DECADES * PARTS)
    counts[3], counts[-1] = 5, 10
    found = draw_histogram(deviation(exact=20, counts=tuple(counts)))
    exact, low, high = found.bars
    assert exact.x == charts.LEFT
    assert [bar.title.rpartition(": ")[2] for bar in found.bars] == ["20", "5", "10"]
    heights = [charts.BOTTOM - bar.y for bar in found.bars]
    np.testing.assert_allclose(heights, np.array([1, 0.25, 0.5]) * (charts.BOTTOM - charts.TOP))
    ends = {tick.text: tick.place for tick in found.across}
    assert high.x + high.width == pytest.approx(charts.RIGHT, abs=1.1)
    assert ends["1"] == pytest.approx(charts.RIGHT)
    decade = (ends["1"] - ends["10\u207b\u2074"]) / 4
    assert charts.RIGHT - low.x == pytest.approx((DECADES - 3 / PARTS) * decade)
    assert found.top == "57%"
    assert "Of 35 numbers compared, 57.1% are exact" in found.summary


def test_dots_lie_where_their_distance_and_error_are() -> None:
    found = draw_scatter(
        deviation(
            distance=np.array([0.0, 0.0, 1e-2, 1.0, 1e2]),
            error=np.array([0.0, 1e-8, 1e-8, 1e-6, 1e-7]),
        ),
        from_grid=True,
    )
    places = dots(found.dots)
    up = {tick.text: tick.place for tick in found.up}
    across = {tick.text: tick.place for tick in found.across}
    assert places[0, 1] == charts.BOTTOM == up["0"]
    np.testing.assert_allclose(places[1:3, 1], up["10\u207b\u2078"], atol=0.1)
    np.testing.assert_allclose(places[3, 1], up["10\u207b\u2076"], atol=0.1)
    assert found.divide is not None
    assert (places[:2, 0] < found.divide).all()
    assert (places[2:, 0] > found.divide).all()
    np.testing.assert_allclose(places[3, 0], across["1"], atol=0.1)
    np.testing.assert_allclose(places[4, 0], across["10\u00b2"], atol=0.1)
    assert places[2, 0] + places[4, 0] == pytest.approx(2 * places[3, 0], abs=0.2)


@pytest.mark.parametrize("from_grid", [True, False])
def test_no_dot_lies_beyond_the_chart(from_grid: bool) -> None:
    tiny = np.array([1e-27, 1e-300, 1e-3, 1e-7, 0.0])
    found = draw_scatter(
        deviation(distance=np.array([1e-30, 1.0, 1e30, 0.0, 2.0]), error=tiny), from_grid=from_grid
    )
    for x, y in dots(found.dots):
        assert charts.LEFT <= x <= charts.RIGHT
        assert charts.TOP <= y <= charts.BOTTOM


def test_exact_is_what_float32_can_say_and_nan_is_no_number() -> None:
    network = describe_network(KAN([1, 1]).eval(), None)
    third = 1 / 3
    outputs = np.array([[third], [0.5], [0.5], [math.nan], [third]])
    probes = Probes((np.zeros((5, 1), np.float32),), np.full(5, "inside"))
    reference = Reference(
        probes,
        outputs,
        outputs[None],
        np.full((5, 1), 1e-3),
        np.ones((5, 1)),
        network.inputs.specs,
        network.outputs,
    )
    answers = np.array([[np.float32(third)], [0.5], [0.5 + 2e-4], [math.nan], [third + 2e-6]])[None]
    measured = measure("m", answers, reference, scores=False)
    (found,) = describe_deviations(network, reference, {"m": answers}, [measured])
    assert (found.exact, found.undefined, sum(found.counts)) == (2, 1, 2)
    assert found.numbers == 4
    filled = np.flatnonzero(found.counts) / PARTS - DECADES
    assert filled.tolist() == [-3, -1]  # 2e-6 and 2e-4 of 1e-3
    assert "1 more are NaN" in draw_histogram(found).summary


# Versions, and what is told of pruning.


def pruned(threshold: float, *layers: PrunedLayer, nodes: tuple[int, ...] = ()) -> PruningRecord:
    change = ChangeRecord("grid", 100, 0.25, 0.125, 0.5, 0.75)
    return PruningRecord(threshold, layers, nodes or None, change)


def test_versions_with_other_edges_are_no_variants(repository: Path, tmp_path: Path) -> None:
    manifest = read_manifest(repository / STATE_DICTS[0].name / "1")
    of = [pruned(0.1, PrunedLayer("a", 4, 1)), pruned(0.2, PrunedLayer("a", 4, 2)), None]
    kinds: list[tuple[Precision, PruningRecord | None]] = [
        ("fp32", of[0]),
        ("fp16", of[0]),
        ("int8", of[1]),
        ("bf16", of[2]),
        ("fp32", of[2]),
    ]
    for version, (precision, pruning) in enumerate(kinds, 1):
        folder = tmp_path / "m" / str(version)
        folder.mkdir(parents=True)
        write_manifest(
            replace(manifest, version=version, precision=precision, pruning=pruning), folder
        )
    here = BundleFolder("m", 9, tmp_path / "m" / "9")

    def found(pruning: PruningRecord | None, source: Source | None = manifest.source) -> set[int]:
        return {m.version for m in find_variants(here, source, "fp16", pruning)}

    assert found(of[0]) == {1}
    assert found(of[1]) == {3}
    assert found(None) == {4, 5}
    assert found(None, Source("other.pt", "0" * 64)) == set()


def test_what_pruning_did_is_told_in_lines() -> None:
    layers = (PrunedLayer("a", 1200, 1100, 100), PrunedLayer("b", 800, 100))
    assert pruning_lines(pruned(0.1, *layers, nodes=(3, 0, 0))) == [
        "1,200 of 2,000 edges left out, 60.0%, of which 100 had no weight before:",
        "    a: 1,100 of 1,200",
        "    b: 100 of 800",
        "nodes left out: 3 inputs; that is what makes it faster",
        "that changes the outputs on 100 random rows within the grid by at most 0.25, typically "
        "0.125; same argmax on 75 %; outputs are 0.5 in size",
    ]
    lines = pruning_lines(pruned(0.1, PrunedLayer("a", 4, 1)))
    assert lines[0] == "1 of 4 edges left out, 25.0%:"
    assert lines[2].startswith("no node is taken out, because")
    assert pruning_lines(pruned(0.1, PrunedLayer("a", 4, 0)))[2].startswith(
        "that changes the outputs"
    )
