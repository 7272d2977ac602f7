"""Networks in the layouts of public projects: exported with a proof, or refused with a remedy that
leads to an export."""

import warnings
from pathlib import Path

import pytest
import torch

from kan_model.adoption import adopt
from tests.layouts import segmentation
from tests.layouts.catalogue import LAYOUTS
from tests.layouts.exporting import check, export_layout
from tests.layouts.layout import Layout

QUICK = ("gpt", "tcn", "two_towers", "multi_task")
"""What the default run exports, so that the catalogue itself is known to work."""

ALL = {step.name: step for layout in LAYOUTS for step in (layout, layout.remedy) if step}


def steps(layout: Layout) -> tuple[Layout, ...]:
    return (layout,) if layout.remedy is None else (layout, layout.remedy)


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.name in QUICK], ids=lambda x: x.name)
def test_a_layout_is_exported_or_its_remedy_is(layout: Layout, tmp_path: Path) -> None:
    for step in steps(layout):
        assert check(step, export_layout(step, tmp_path)) is None


@pytest.mark.layouts
@pytest.mark.parametrize("layout", ALL.values(), ids=lambda x: x.name)
def test_every_layout_has_the_result_that_the_catalogue_expects(
    layout: Layout, tmp_path: Path
) -> None:
    assert check(layout, export_layout(layout, tmp_path)) is None


def test_every_refused_layout_has_a_remedy_that_is_to_be_exported() -> None:
    refused = [layout for layout in LAYOUTS if layout.refusal is not None]
    assert refused
    for layout in refused:
        assert layout.refusal
        assert layout.remedy is not None
        assert layout.remedy.refusal is None


def test_there_are_at_least_45_layouts_with_names_of_their_own() -> None:
    names = [layout.name for layout in LAYOUTS]
    assert len(set(names)) == len(names) >= 45


def test_a_factory_makes_the_same_weights_each_time() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of an old weight norm
        for layout in ALL.values():
            first, second = layout.build().state_dict(), layout.build().state_dict()
            assert list(first) == list(second)
            for name, tensor in first.items():
                assert torch.equal(tensor, second[name]), f"{layout.name}: {name}"


@torch.no_grad()
def test_the_u_kans_that_exports_are_timed_with_have_12_kan_layers_and_maps_of_one_class() -> None:
    small = segmentation.ukan_small()
    assert sum(adopt(part) is not None for part in small.modules()) == 12
    assert small(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 64, 64)
    with torch.device("meta"):
        large = segmentation.UKAN((256, 320, 512))
    widths = {p.shape[1] for name, p in large.named_parameters() if name.endswith("base_weight")}
    assert widths == {256, 320, 512}
