"""Curves, importances and attributions as numbers, against the definition edge by edge."""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from export.curves import (
    LayerCurves,
    attribution,
    curve_points,
    has_curves,
    importance,
    layer_curves,
)
from export.moments import Moments
from kan_model import KAN, KANLinear
from kan_model.splines import b_spline_basis
from tests.conftest import ROOT, Golden
from tests.layers import golden_layers, phi


def all_curves(layer: KANLinear, name: str = "layer") -> LayerCurves:
    return layer_curves(name, layer, importance(layer), sampled=False)


def test_curves_are_what_the_definition_says(golden: Golden) -> None:
    for layer in golden_layers(golden):
        curves = all_curves(layer)
        assert curves.complete
        for place in (0, 3, len(curves.edges) - 1):
            feature, output = curves.ends(place)
            curve = curves.curve(place)
            inner = slice(0, -1)  # the half-open intervals end before the last knot
            expected = np.array(
                [phi(layer, feature, output, x, golden.activation) for x in curve.x[inner]]
            )
            np.testing.assert_allclose(curve.base[inner], expected[:, 0], rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(curve.spline[inner], expected[:, 1], rtol=1e-9, atol=1e-12)
            np.testing.assert_array_equal(curve.total, curve.base + curve.spline)


def test_every_knot_is_a_point_of_the_curve() -> None:
    knots = np.array([-1.0, 0.5, 3.0])
    np.testing.assert_allclose(curve_points(knots, 2), [-1, -0.25, 0.5, 0.5, 1.75, 3.0])


def test_a_staircase_jumps_at_its_knots() -> None:
    torch.manual_seed(0)
    layer = KANLinear(1, 1, grid_size=3, spline_order=0)
    curve = all_curves(layer).curve(0)
    steps = (layer.spline_weight[0, 0] * layer.spline_scaler[0, 0]).detach().double().numpy()
    ends = curve.spline.reshape(3, -1)
    np.testing.assert_allclose(ends, np.broadcast_to(steps[:, None], ends.shape), rtol=1e-7)


def test_importance_is_the_standard_deviation_over_the_samples(golden: Golden) -> None:
    layer = golden_layers(golden)[0]
    x = golden.x[:40][np.isfinite(golden.x[:40]).all(axis=1)]
    found = importance(layer, torch.from_numpy(x)).numpy()
    for feature, output in ((0, 0), (layer.in_features - 1, layer.out_features - 1), (1, 2)):
        values = [
            sum(phi(layer, feature, output, float(v), golden.activation)) for v in x[:, feature]
        ]
        assert found[output, feature] == pytest.approx(np.std(values), rel=1e-7)


def test_without_samples_it_is_that_over_the_grid(golden: Golden) -> None:
    layer = golden_layers(golden)[1]
    found = importance(layer).numpy()
    knots = layer.grid[2].double().numpy()
    low, high = knots[layer.spline_order], knots[-1 - layer.spline_order]
    x = low + (high - low) * (np.arange(64) + 0.5) / 64
    values = [sum(phi(layer, 2, 1, float(v), golden.activation)) for v in x]
    assert found[1, 2] == pytest.approx(np.std(values), rel=1e-7)


def test_a_constant_edge_has_no_importance_and_nan_weights_give_nan() -> None:
    torch.manual_seed(0)
    layer = KANLinear(3, 2)
    with torch.no_grad():
        layer.base_weight[1, 2] = 0
        layer.spline_weight[1, 2] = 5  # the functions of a basis sum to one
        layer.base_weight[0, 1] = math.nan
    found = importance(layer)
    assert found[1, 2] < 1e-6 * found[1, 0]
    assert math.isnan(found[0, 1])
    assert int(found.isnan().sum()) == 1
    assert all_curves(layer).ends(5) == (1, 0)  # what is no number comes last


def test_samples_that_are_not_finite_are_passed_over() -> None:
    torch.manual_seed(0)
    layer = KANLinear(2, 2)
    x = torch.rand(50, 2)
    spoilt = torch.cat([x, torch.tensor([[math.nan, math.inf], [-math.inf, math.nan]])])
    torch.testing.assert_close(importance(layer, spoilt), importance(layer, x))
    assert (importance(layer, torch.full((4, 2), math.nan)) == 0).all()


def dense_importance(layer: KANLinear, x: torch.Tensor) -> torch.Tensor:
    """The definition: every edge at every point, shape (rows, in) to (out, in)."""
    weight = layer.spline_weight.detach().double()
    if layer.enable_standalone_scale_spline:
        weight = weight * layer.spline_scaler.detach().double()[..., None]
    found = torch.empty(layer.base_weight.shape, dtype=torch.float64)
    for i in range(layer.in_features):
        own = x[x[:, i].isfinite(), i].double()
        basis = b_spline_basis(own[:, None], layer.grid[i : i + 1].double(), layer.spline_order)
        base = layer.base_activation(own)[:, None] * layer.base_weight[:, i].detach().double()
        found[:, i] = (base + basis[:, 0] @ weight[:, i].T).std(dim=0, correction=0)
    return found


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("grid_size", [1, 2, 7, 40])
@pytest.mark.parametrize("scaler", [True, False])
@torch.no_grad()
def test_a_band_of_products_gives_every_edges_deviation(
    order: int, grid_size: int, scaler: bool
) -> None:
    torch.manual_seed(order)
    layer = KANLinear(
        4, 3, grid_size=grid_size, spline_order=order, enable_standalone_scale_spline=scaler
    )
    layer.spline_weight.normal_()
    x = torch.randn(300, 4) * 2  # many outside of the grid, and beyond its margins
    x[:, 1] *= 1e-3
    x[5, 2], x[6, 2], x[7, 3] = math.nan, math.inf, 1e30
    x[8:20, 3] = layer.grid[3, 0]  # on knots
    x[20:30, 3] = layer.grid[3, -1]
    torch.testing.assert_close(
        importance(layer, x), dense_importance(layer, x), rtol=1e-9, atol=1e-12
    )
    moved = layer.grid + 0.3 * torch.rand(4, 1)
    layer.grid.copy_(moved)
    count = max(64, 4 * grid_size)
    low, high = moved[:, order].double(), moved[:, order + grid_size].double()
    over = low + (high - low) * (torch.arange(count).double()[:, None] + 0.5) / count
    torch.testing.assert_close(
        importance(layer), dense_importance(layer, over), rtol=1e-9, atol=1e-12
    )


@torch.no_grad()
def test_an_input_that_never_varies_gives_its_edges_no_importance_at_all() -> None:
    torch.manual_seed(0)
    layer = KANLinear(3, 2)
    x = torch.rand(100, 3)
    x[:, 1] = 0.1234
    found = importance(layer, x)
    assert (found[:, 1] == 0).all()
    assert (found[:, [0, 2]] > 1e-3).all()


@torch.no_grad()
def test_a_constant_spline_has_no_importance_however_high_it_lies() -> None:
    torch.manual_seed(0)
    layer = KANLinear(2, 2, grid_size=20)
    layer.base_weight[0, 0] = 0
    layer.spline_weight[0, 0] = 1e6
    assert importance(layer)[0, 0] < 1e-8
    assert importance(layer, torch.rand(50, 2))[0, 0] < 1e-8


@pytest.mark.parametrize("budget", [200, 20, 1])
def test_large_layers_are_measured_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    torch.manual_seed(0)
    layer = KANLinear(7, 5)
    x = torch.randn(30, 7)
    whole = importance(layer), importance(layer, x)
    most: list[int] = []
    measured = Moments.deviation

    def note(own: Moments, base: torch.Tensor, spline: torch.Tensor) -> torch.Tensor:
        most.append(spline.numel())
        return measured(own, base, spline)

    monkeypatch.setattr(Moments, "deviation", note)
    monkeypatch.setattr("export.curves._BUDGET", budget)
    torch.testing.assert_close(importance(layer), whole[0])
    torch.testing.assert_close(importance(layer, x), whole[1])
    assert max(most) <= max(budget, layer.spline_weight.shape[2])
    assert sum(most) == 2 * layer.spline_weight.numel()


def test_the_memory_of_a_fine_grid_grows_with_its_intervals_alone() -> None:
    """Functions times functions would be 3.4 GB, and points times functions 13 GB."""
    tracker = (
        "import resource, torch; from kan_model import KANLinear;"
        "from export.curves import importance;"
        "layer = KANLinear(1, 1, grid_size=5, spline_order=3);"
        "layer.grid_size, layer.grid = 20000, torch.arange(-3., 20004.)[None];"
        "layer.spline_weight = torch.nn.Parameter(torch.randn(1, 1, 20003));"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "importance(KANLinear(1, 1)); before = peak(); importance(layer);"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", tracker], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000  # KB


class Flattened(nn.Module):
    """Element by element, on a tensor that lies in one piece."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.view(-1)).view(x.shape)


@pytest.mark.parametrize("activation", [nn.SiLU, Flattened, lambda: nn.PReLU(1)])
def test_an_activation_of_each_number_has_curves(activation: Callable[[], nn.Module]) -> None:
    layer = KANLinear(4, 2, base_activation=activation)
    assert has_curves(layer)
    assert (importance(layer) > 0).all()


@pytest.mark.parametrize(
    "activation", [lambda: nn.Softmax(dim=2), lambda: nn.Softmax(dim=-1), lambda: nn.PReLU(4)]
)
def test_an_activation_that_goes_by_places_has_none(activation: Callable[[], nn.Module]) -> None:
    layer = KANLinear(4, 2, base_activation=activation)
    if isinstance(layer.base_activation, nn.PReLU):
        with torch.no_grad():
            layer.base_activation.weight.copy_(torch.arange(4))
    assert not has_curves(layer)


def test_attribution_is_shared_among_inputs_by_importance() -> None:
    first = np.array([[1.0, 3.0], [0.0, 0.0]])  # two inputs to two nodes, of which one is constant
    second = np.array([[3.0, 1.0]])
    scores = attribution([first, second])
    np.testing.assert_allclose(scores[2], [1.0])
    np.testing.assert_allclose(scores[1], [0.75, 0.25])
    np.testing.assert_allclose(scores[0], [0.75 / 4, 0.75 * 3 / 4])


def test_an_input_that_moves_nothing_has_no_attribution() -> None:
    torch.manual_seed(0)
    kan = KAN([3, 4, 2])
    with torch.no_grad():
        for weight in (kan.layers[0].base_weight, kan.layers[0].spline_scaler):
            weight[:, 1] = 0
    scores = attribution([importance(layer).numpy() for layer in kan.layers])
    assert scores[0][1] == 0
    assert scores[0].sum() == pytest.approx(1)


def test_what_there_is_no_room_for_is_the_least_important() -> None:
    torch.manual_seed(0)
    layer = KANLinear(20, 6)
    measured = importance(layer)
    curves = layer_curves("l", layer, measured, sampled=False, most_edges=10, most_inputs=4)
    assert not curves.complete
    expected = measured.flatten().sort(descending=True).values
    count = len(curves.edges)
    np.testing.assert_array_equal(curves.importance, expected[:count])
    following = int(measured.flatten().argsort(descending=True)[count]) % 20
    assert count == 10 or following not in curves.inputs  # there is no room for its input
    assert len(curves.inputs) == 4
    for place in range(count):
        feature, output = curves.ends(place)
        assert feature in curves.inputs
        assert curves.importance[place] == measured[output, feature]
        assert curves.place(feature, output) == place


def test_a_strong_edge_of_a_weak_input_is_there_and_free_places_go_to_strong_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = KANLinear(6, 4)
    measured = torch.ones(4, 6) * torch.arange(1, 7) / 100
    measured[2, 0] = 1  # of the input whose others are the weakest
    for budget in (2**22, 3):
        monkeypatch.setattr("export.curves._BUDGET", budget)
        curves = layer_curves("l", layer, measured, sampled=False, most_edges=3, most_inputs=3)
        assert curves.ends(0) == (0, 2)
        assert [curves.ends(place)[0] for place in (1, 2)] == [5, 5]
        assert curves.inputs.tolist() == [0, 4, 5]
