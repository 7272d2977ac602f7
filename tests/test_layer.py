import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from kan_model import KANLinear
from kan_model.splines import b_spline_basis, fit_coefficients
from tests.oracle import kan as oracle_kan
from tests.oracle import silu


def spline_part(layer: KANLinear, x: torch.Tensor) -> torch.Tensor:
    """What the layer's splines contribute, without the base path."""
    outputs: torch.Tensor = layer(x)
    return outputs - linear(layer.base_activation(x), layer.base_weight)


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("scaler", [True, False])
def test_forward_is_the_definition_edge_by_edge(order: int, scaler: bool) -> None:
    torch.manual_seed(order)
    layer = KANLinear(
        3, 2, grid_size=4, spline_order=order, enable_standalone_scale_spline=scaler
    ).double()
    x = torch.randn(12, 3, dtype=torch.float64)
    state = {f"layers.0.{k}": v.detach().numpy() for k, v in layer.state_dict().items()}
    expected = oracle_kan(state, x.numpy(), silu)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, ["base_weight", "spline_weight", "spline_scaler", "grid"], id="scaler"),
        pytest.param(
            {"enable_standalone_scale_spline": False},
            ["base_weight", "spline_weight", "grid"],
            id="no scaler",
        ),
    ],
)
def test_state_dict_is_upstreams(options: dict[str, Any], expected: list[str]) -> None:
    layer = KANLinear(3, 4, **options)
    state = layer.state_dict()
    assert list(state) == expected
    assert state["spline_weight"].shape == (4, 3, 8)
    assert state["grid"].shape == (3, 12)


def test_no_tensor_of_batch_by_out_by_in_exists() -> None:
    batch, width = 16, 32
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    layer = KANLinear(width, width)
    x = torch.randn(batch, width)
    with Watch(), torch.no_grad():  # type: ignore[no-untyped-call]
        layer(x)
    assert 0 < largest < batch * width * width


def test_any_leading_dimensions() -> None:
    layer = KANLinear(3, 2)
    x = torch.randn(2, 5, 3)
    flat = layer(x.reshape(-1, 3))
    torch.testing.assert_close(layer(x), flat.reshape(2, 5, 2))
    torch.testing.assert_close(layer(x[0, 0]), flat[0])
    assert layer(torch.zeros(0, 3)).shape == (0, 2)


@pytest.mark.parametrize("shape", [(), (4,), (5, 1), (2, 3, 4)])
def test_wrong_width_is_an_error_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"expects inputs of shape \(\.\.\., 3\), found \("
    ) as error:
        KANLinear(3, 2)(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spline_order": 6}, "spline_order must be 0 to 5, found 6"),
        ({"spline_order": -1}, "spline_order must be 0 to 5, found -1"),
        ({"grid_size": 0}, "grid_size must be at least 1, found 0"),
        ({"in_features": 0}, "in_features must be at least 1, found 0"),
        ({"grid_range": [1.0, -1.0]}, "finite with low < high"),
        ({"grid_range": [0.0, math.inf]}, "finite with low < high"),
        ({"grid_range": [0.0]}, r"must be \(low, high\)"),
        ({"grid_range": [1e6, 1e6 + 0.1]}, "too narrow for 5 intervals"),
        ({"grid_eps": 1.5}, r"grid_eps must be in \[0, 1\]"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KANLinear(**{"in_features": 2, "out_features": 2, **arguments})


def test_outside_the_outermost_knots_only_the_base_path_remains() -> None:
    layer = KANLinear(2, 3)
    x = torch.tensor([[2.2001, -2.2001], [1e6, -1e6]])
    torch.testing.assert_close(spline_part(layer, x), torch.zeros(2, 3), rtol=0, atol=0)


@pytest.mark.parametrize("order", range(1, 6))
def test_nan_in_nan_out(order: int) -> None:
    layer = KANLinear(2, 3, spline_order=order)
    assert layer(torch.tensor([[0.0, math.nan]])).isnan().all()


@pytest.mark.parametrize("scaler", [True, False])
@pytest.mark.parametrize("order", range(6))
def test_update_grid_keeps_a_function_the_new_knots_can_hold(order: int, scaler: bool) -> None:
    """A polynomial of degree k is a spline of order k on any knots, so nothing may be lost."""
    torch.manual_seed(order)
    layer = KANLinear(
        3, 4, spline_order=order, enable_standalone_scale_spline=scaler, grid_range=(-4, 4)
    ).double()
    dense = torch.linspace(-4, 3.999, 400).double().unsqueeze(1).expand(-1, 3)
    with torch.no_grad():
        degrees = torch.arange(order + 1)
        curves = (dense.unsqueeze(-1) / 4) ** degrees @ torch.randn(order + 1, 4).double()
        layer.spline_weight.copy_(fit_coefficients(dense, curves, layer.grid, order))
    x = torch.randn(2000, 3).double().clamp(-3.9, 3.9)
    before = layer(x)
    layer.update_grid(x)
    torch.testing.assert_close(layer(x), before, rtol=1e-9, atol=1e-9)


def test_update_grid_with_the_scaler_is_as_close_as_without() -> None:
    """Upstream applies the scale twice; here the scaler makes no difference to the refit."""

    def drift(scaler: bool) -> float:
        torch.manual_seed(0)
        layer = KANLinear(4, 3, enable_standalone_scale_spline=scaler).double()
        x = torch.randn(3000, 4).double() * 0.4
        with torch.no_grad():
            before = spline_part(layer, x)
            layer.update_grid(x)
            return float((spline_part(layer, x) - before).norm() / before.norm())

    assert drift(True) < 2 * drift(False) < 1.0


def test_update_grid_takes_leading_dimensions_and_moves_the_knots() -> None:
    layer = KANLinear(3, 2)
    before = layer.grid.clone()
    layer.update_grid(torch.randn(4, 50, 3))
    assert not torch.equal(layer.grid, before)
    assert (layer.grid.diff(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.full((10, 2), 1e6), "knots of feature 0 collapse"),
        (torch.zeros(0, 2), "at least one sample"),
        (torch.tensor([[0.0, math.nan]]), "finite samples"),
        (torch.zeros(5, 3), "expects inputs of shape"),
    ],
)
def test_update_grid_refuses_and_changes_nothing(samples: torch.Tensor, message: str) -> None:
    layer = KANLinear(2, 2)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        layer.update_grid(samples)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


SAMPLES = {
    "one sample": lambda g: torch.full((1, 3), 0.3),
    "constant": lambda g: torch.full((200, 3), 0.5),
    "binary": lambda g: torch.randint(0, 2, (1000, 3), generator=g).float(),
    "five values": lambda g: torch.randint(0, 5, (1000, 3), generator=g) / 5,
    "mostly zero": lambda g: (
        torch.randn(1000, 3, generator=g) * (torch.rand(1000, 3, generator=g) < 0.1)
    ),
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("scaler", [True, False])
def test_update_grid_fits_as_well_as_can_be_where_samples_are_few_or_alike(
    kind: str, scaler: bool
) -> None:
    """Basis functions without samples lose rank; the refit must still be the least-squares one."""
    torch.manual_seed(0)
    layer = KANLinear(3, 2, enable_standalone_scale_spline=scaler).double()
    x = SAMPLES[kind](torch.Generator().manual_seed(0)).double()
    old = b_spline_basis(x, layer.grid, 3).numpy()  # (points, in, n)
    weight = layer.scaled_spline_weight.detach().numpy().copy()
    layer.update_grid(x)
    new = b_spline_basis(x, layer.grid, 3).numpy()
    found = layer.scaled_spline_weight.detach().numpy()
    for i in range(3):
        before = old[:, i] @ weight[:, i].T  # (points, out)
        best = new[:, i] @ (np.linalg.pinv(new[:, i]) @ before)
        after = new[:, i] @ found[:, i].T
        np.testing.assert_allclose(after, best, atol=1e-9 * np.abs(before).max())


def test_regularization_is_l1_plus_entropy_of_the_edges() -> None:
    layer = KANLinear(3, 2)
    norms = np.abs(layer.spline_weight.detach().numpy()).mean(-1)
    share = norms / norms.sum()
    expected = 0.3 * norms.sum() - 2.0 * (share * np.log(share)).sum()
    assert layer.regularization_loss(0.3, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_regularization_of_zero_weights_is_zero_with_a_finite_gradient() -> None:
    layer = KANLinear(3, 2)
    with torch.no_grad():
        layer.spline_weight.zero_()
    loss = layer.regularization_loss()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert layer.spline_weight.grad is not None
    assert layer.spline_weight.grad.isfinite().all()


def test_it_trains() -> None:
    torch.manual_seed(0)
    layer = KANLinear(1, 1)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.linspace(-1, 1, 200).unsqueeze(1)
    y = torch.sin(3 * x)
    for _ in range(200):
        optimiser.zero_grad()
        loss = nn.functional.mse_loss(layer(x), y)
        loss.backward()
        optimiser.step()
    assert loss.item() < 1e-3


def test_the_same_seed_gives_the_same_layer() -> None:
    def seeded() -> KANLinear:
        torch.manual_seed(7)
        return KANLinear(3, 3, base_activation=nn.GELU)

    for a, b in zip(seeded().parameters(), seeded().parameters(), strict=True):
        torch.testing.assert_close(a, b)
