"""Curves, importances and attributions as numbers, against the definition edge by edge."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from export.curves import (
    LayerCurves,
    attribution,
    curve_points,
    importance,
    layer_curves,
    why_no_curves,
)
from kan_model import KAN, KANLinear
from tests.conftest import Golden
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


class Flattened(nn.Module):
    """Element by element, on a tensor that lies in one piece."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.view(-1)).view(x.shape)


@pytest.mark.parametrize("activation", [nn.SiLU, Flattened, lambda: nn.PReLU(1)])
def test_an_activation_of_each_number_has_curves(activation: Callable[[], nn.Module]) -> None:
    layer = KANLinear(4, 2, base_activation=activation)
    assert why_no_curves(layer) is None
    assert (importance(layer) > 0).all()


@pytest.mark.parametrize(
    ("activation", "why"),
    [
        (lambda: nn.Softmax(dim=2), "fails on numbers of its own (IndexError: "),
        (lambda: nn.Softmax(dim=-1), "goes by places"),
        (lambda: nn.PReLU(4), "goes by places"),
    ],
)
def test_an_activation_that_goes_by_places_has_none(
    activation: Callable[[], nn.Module], why: str
) -> None:
    layer = KANLinear(4, 2, base_activation=activation)
    if isinstance(layer.base_activation, nn.PReLU):
        with torch.no_grad():
            layer.base_activation.weight.copy_(torch.arange(4))
    assert (why_no_curves(layer) or "").startswith(why)


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
