"""The exported form of a KANLinear computes what the layer computes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import InputError, NetworkError, export_module
from export.conversion import basis
from export.conversion.lowering import (
    CARDINAL_FACTOR,
    ExpSiLU,
    LoweredKANLinear,
    choose_form,
    choose_forms,
    lower_layers,
    probes_within,
)
from export.conversion.onnx_graph import write_onnx
from export.network import Call, describe_network
from export.parts import swapped
from export.runtimes import load_onnx
from kan_bundle.manifest import Form
from kan_model import KAN, KANLinear
from tests.layers import answers_of_the_oracle, make_layer, write_and_run

# A staircase, order 0, has no closed form.
FORMS: list[tuple[Form, int]] = [
    *(("cardinal", order) for order in range(1, 6)),
    *(("recursion", order) for order in range(6)),
]


@pytest.mark.parametrize(
    ("form", "order", "knots"),
    [
        (form, order, knots)
        for form, order in FORMS
        for knots in ("uniform", "steps", "adapted")
        if (form, knots) != ("cardinal", "adapted")
    ],
)
def test_both_forms_are_the_recursion(order: int, form: Form, knots: str) -> None:
    layer = make_layer(order, knots=knots)
    rows = probes_within(layer)[::9]
    rows = torch.cat([rows, torch.tensor([[40.0, -40.0, 1e6, 0.0], [-1e6, 9.0, -9.0, 3e4]])])
    found = LoweredKANLinear(layer, form)(rows).detach().double().numpy()
    expected = answers_of_the_oracle(layer, rows)
    # Float32: knots are rounded to 6e-8 of their size, a spline's slope is up to its order a step.
    assert (np.abs(found - expected) <= 1e-5 * np.maximum(1, np.abs(expected))).all()


@pytest.mark.parametrize(("form", "order"), FORMS)
@pytest.mark.parametrize("per_row", [1, 8, 12, 20, 1000])
def test_functions_may_be_grouped_in_any_way(
    per_row: int, form: Form, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine functions of four features: alone, by two, three, five (the last is not full), all."""
    layer = make_layer(order, 9 - order, knots="uniform" if form == "cardinal" else "adapted")
    rows = probes_within(layer)
    expected = layer.double()(rows.double())
    monkeypatch.setattr(basis, "_NUMBERS_A_ROW", {form: per_row})
    module = LoweredKANLinear(layer.float(), form)
    torch.testing.assert_close(module(rows).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.Identity])
@pytest.mark.parametrize("form", ["cardinal", "recursion"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_what_is_no_number_makes_the_row_nan(
    tmp_path: Path, order: int, form: Form, activation: type[nn.Module]
) -> None:
    layer = KANLinear(3, 2, spline_order=order, base_activation=activation)
    rows = torch.zeros(4, 3)
    rows[:3, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected = layer(rows).isnan()
    assert expected.any(dim=1).tolist() == [True, True, True, False]
    module = LoweredKANLinear(layer, form)
    assert torch.equal(module(rows).isnan(), expected)
    found = write_and_run(module, rows, tmp_path)
    np.testing.assert_array_equal(np.isnan(found), expected.numpy())


def test_the_closed_form_is_for_equal_steps_and_the_recursion_for_others() -> None:
    torch.manual_seed(0)
    # Steps of 1 are exact in float32, so the closed form is far from its limit on any processor.
    assert choose_form(KANLinear(4, 3, grid_size=4, grid_range=(-2.0, 2.0))).form == "cardinal"
    assert choose_form(make_layer(knots="steps", features=2)).form == "cardinal"
    assert choose_form(make_layer(knots="adapted")).form == "recursion"
    assert choose_form(make_layer(0)).form == "recursion"  # a staircase is exact at its knots


def test_one_feature_with_other_knots_is_enough_for_the_recursion() -> None:
    layer = make_layer()
    layer.grid[2, 5] += 0.01
    assert choose_form(layer).form == "recursion"


@torch.no_grad()
def test_the_closed_form_is_refused_where_the_rounding_of_knots_shows() -> None:
    """A hundred steps of 0.0375: half a unit in the last place of 2.25 is 3e-6 of a step."""
    layer = make_layer(order=1, grid_size=100)
    choice = choose_form(layer)
    assert choice.form == "recursion"
    rows = probes_within(layer)
    exact = copy.deepcopy(layer).double()(rows.double())
    off = float((LoweredKANLinear(layer, "cardinal")(rows) - exact).abs().max())
    assert off > CARDINAL_FACTOR * choice.eager_error


@torch.no_grad()
def test_the_measured_errors_are_those_of_the_layers() -> None:
    layer = make_layer()
    choice, rows = choose_form(layer), probes_within(layer)
    exact = copy.deepcopy(layer).double()(rows.double())
    off = (LoweredKANLinear(layer, choice.form)(rows) - exact).abs().max()
    assert choice.error == float(off)
    assert choice.eager_error == float((layer(rows) - exact).abs().max())


def test_a_few_outputs_of_a_wide_layer_are_measured() -> None:
    """From the first to the last, 64 in all; one beside them, as large as it may be, is not."""
    layer = KANLinear(3, 1000)
    with torch.no_grad():
        layer.base_weight[1] = 1e6
    before = layer.base_weight.clone()
    assert 0 < choose_form(layer).error < 1e-6
    assert torch.equal(layer.base_weight, before)
    assert layer.out_features == 1000
    with torch.no_grad():
        layer.base_weight[-1] = 1e6
    assert choose_form(layer).error > 1e-3


def test_inputs_far_from_zero_do_not_hide_the_error_of_the_spline() -> None:
    """Knots near 1000 are rounded to 3e-5, a ten-thousandth of a step."""
    torch.manual_seed(0)
    layer = KANLinear(4, 3, grid_range=(1000.0, 1001.0), base_activation=nn.Tanh)
    nn.init.normal_(layer.spline_weight)
    choice = choose_form(layer)
    assert choice.form == "recursion"
    assert choice.error < 1e-5


@pytest.mark.parametrize("size", [1e30, 1e38])
def test_weights_that_overflow_are_refused_with_the_layer(tmp_path: Path, size: float) -> None:
    kan = KAN([3, 2])
    with torch.no_grad():
        kan.layers[0].spline_weight.fill_(size)
        kan.layers[0].spline_scaler.fill_(size)
    with pytest.raises(NetworkError, match=r"layers\.0: expected numbers, found NaN or infinity"):
        export_module(kan, name="m", output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_too_large_everywhere_is_refused(tmp_path: Path) -> None:
    """Every answer is finite in float32, but so large that terms before it may not be."""
    kan = KAN([3, 2], grid_range=(1.0, 2.0))
    with torch.no_grad():
        kan.layers[0].base_weight.fill_(3e37)
    with pytest.raises(NetworkError, match="look at its weights"):
        export_module(kan, name="m", output=tmp_path)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_single_row_is_added_up_as_exactly_as_by_eager() -> None:
    """One input far outside the grid: its term is huge, and later sums are rounded to its size."""
    torch.manual_seed(0)
    layer = KANLinear(1000, 64, grid_size=20, scale_noise=20.0)
    row = 0.5 * torch.randn(1, 1000)
    row[0, 0] = 1e6
    exact = copy.deepcopy(layer).double()(row.double())
    eager = (layer(row) - exact).square().mean()
    for form in ("cardinal", "recursion"):
        assert (LoweredKANLinear(layer, form)(row) - exact).square().mean() <= 4 * eager


def test_silu_keeps_its_relative_precision_in_onnxruntime(tmp_path: Path) -> None:
    """Where onnxruntime's own Sigmoid would lose it: far to the left."""
    path = tmp_path / "silu.onnx"
    call = Call(ExpSiLU(), ["x"]).eval()
    write_onnx(call, (torch.zeros(2, 1),), ["x"], ["y"], path, "silu", {})
    run = load_onnx(path)
    x = np.linspace(-80, 30, 100_001, dtype=np.float32)[:, None]
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(run([x])[0] - exact) <= 1e-5 * np.abs(exact)).all()
    edges = np.array([[np.nan], [-np.inf], [np.inf], [-1e30], [0.0]], dtype=np.float32)
    expected = nn.functional.silu(torch.from_numpy(edges)).numpy()
    np.testing.assert_array_equal(run([edges])[0], expected)


def test_lowering_leaves_the_network_as_it_was() -> None:
    kan = KAN([3, 4, 2])
    network = describe_network(kan, None)
    x = torch.randn(50, 3) * 3
    before, layers = kan(x), list(kan.layers)
    choices = choose_forms(network)
    with swapped(network.call, lower_layers(network, choices)):
        assert isinstance(kan.layers[0], LoweredKANLinear)
        torch.testing.assert_close(network.call(x)[0], before, rtol=1e-5, atol=1e-6)
    assert list(kan.layers) == layers
    assert torch.equal(kan(x), before)
    forms = lower_layers(network, choices)
    with pytest.raises(RuntimeError, match="must match"), swapped(network.call, forms):
        network.call(torch.zeros(2, 5))
    assert list(kan.layers) == layers


def test_only_silu_is_written_in_another_form() -> None:
    for activation, form in ((nn.GELU, nn.GELU), (nn.SiLU, ExpSiLU)):
        layer = LoweredKANLinear(KAN([2, 1], base_activation=activation).layers[0], "cardinal")
        assert isinstance(layer.activation, form)


def test_a_lowered_layer_takes_any_leading_dimensions() -> None:
    layer = KAN([3, 2]).layers[0]
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(LoweredKANLinear(layer, "cardinal")(x), layer(x))


class HalfOfTheLine(nn.Module):
    """An activation that is NaN for negative numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_an_activation_that_is_no_number_somewhere_stops_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kan = KAN([2, 1], grid_range=[0.1, 1.0], base_activation=HalfOfTheLine)
    manifest = export_module(kan, name="m", output=tmp_path)
    assert manifest.layers[0].lowering_error < 1e-6


def test_an_activation_with_a_slope_for_each_channel_knows_them(tmp_path: Path) -> None:
    """PReLU takes the second dimension for its channels, in (batch, channels, features) too."""

    class Slopes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            slopes = nn.PReLU(3)
            nn.init.uniform_(slopes.weight)
            self.layer = KANLinear(4, 2, base_activation=lambda: slopes)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    x = torch.randn(5, 3, 4)
    network = Slopes().eval()
    lowered_layer = LoweredKANLinear(network.layer, "cardinal")
    torch.testing.assert_close(lowered_layer(x), network(x))
    export_module(network, name="m", output=tmp_path, input_shape="3,4")


def test_edges_that_are_no_functions_of_one_number_are_neither_drawn_nor_left_out(
    tmp_path: Path,
) -> None:
    layer = KANLinear(4, 2, base_activation=lambda: nn.PReLU(3))
    network = nn.Sequential(layer).eval()
    export_module(network, name="m", output=tmp_path, input_shape="3,4")
    page = (tmp_path / "m" / "1" / "report.html").read_text()
    assert "the edges of 0 are not drawn" in page
    with pytest.raises(InputError, match="base activation of 0 fails on numbers of its own"):
        export_module(network, name="p", output=tmp_path, input_shape="3,4", prune=0.1)
    assert not (tmp_path / "p").exists()
