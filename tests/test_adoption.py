from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kan_model import KANLinear
from kan_model.activations import activation_name
from kan_model.adoption import adopt, is_altered
from kan_model.state_dict import knots_rise
from tests import zoo


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("scaler", [True, False])
def test_a_copy_of_efficient_kan_is_adopted_with_its_own_tensors(order: int, scaler: bool) -> None:
    torch.manual_seed(0)
    theirs = zoo.KANLinear(3, 2, grid_size=7, spline_order=order, scaler=scaler)
    ours = adopt(theirs)
    assert isinstance(ours, KANLinear)
    assert ours.spline_weight is theirs.spline_weight
    assert ours.base_weight is theirs.base_weight
    x = torch.linspace(-3, 3, 60).reshape(20, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def test_our_own_layer_is_itself() -> None:
    layer = KANLinear(3, 2)
    assert adopt(layer) is layer


def test_a_base_activation_may_be_a_function() -> None:
    torch.manual_seed(0)
    theirs = zoo.KANLinear(3, 2, base_activation=lambda: torch.sin)
    ours = adopt(theirs)
    assert ours is not None
    x = torch.randn(5, 3)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "tanh"])
def test_a_function_that_torch_has_a_module_for_is_that_module(name: str) -> None:
    function = getattr(nn.functional, name)
    ours = adopt(zoo.KANLinear(3, 2, base_activation=lambda: function))
    assert ours is not None
    assert activation_name(ours.base_activation) == name
    x = torch.linspace(-4, 4, 50)
    torch.testing.assert_close(ours.base_activation(x), function(x), rtol=0, atol=0)


def test_a_grid_that_is_no_buffer_is_found() -> None:
    torch.manual_seed(0)
    theirs = zoo.KANLinear(3, 2)
    grid = theirs.grid
    del theirs.grid
    theirs.grid = grid
    assert "grid" not in dict(theirs.named_buffers())
    ours = adopt(theirs)
    assert ours is not None
    x = torch.randn(5, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def without_grid(layer: zoo.KANLinear) -> None:
    del layer.grid


def with_norm(layer: zoo.KANLinear) -> None:
    layer.norm = nn.LayerNorm(2)


def with_bias(layer: zoo.KANLinear) -> None:
    layer.bias = nn.Parameter(torch.zeros(2))


def with_other_order(layer: zoo.KANLinear) -> None:
    layer.spline_order = 2


def with_symbolic_edge(layer: zoo.KANLinear) -> None:
    layer.register_buffer("symbolic_mask", torch.ones(2, 3))


def with_no_activation(layer: zoo.KANLinear) -> None:
    del layer.base_activation


@pytest.mark.parametrize(
    "change",
    [
        without_grid,
        with_norm,
        with_bias,
        with_other_order,
        with_symbolic_edge,
        with_no_activation,
    ],
)
def test_what_holds_something_else_is_not_adopted(change: Any) -> None:
    layer = zoo.KANLinear(3, 2)
    assert adopt(layer) is not None
    change(layer)
    assert adopt(layer) is None


def with_a_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, inputs, output: None)


def with_a_hook_before(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda module, inputs: None)


def with_a_hook_of_names(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, inputs, names, output: None, with_kwargs=True)


def with_a_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x)


@pytest.mark.parametrize("kind", [KANLinear, zoo.KANLinear])
@pytest.mark.parametrize(
    "change", [with_a_hook, with_a_hook_before, with_a_hook_of_names, with_a_forward]
)
def test_a_layer_with_hooks_is_adopted_without_them(kind: Any, change: Any) -> None:
    torch.manual_seed(0)
    layer = kind(3, 2)
    change(layer)
    ours = adopt(layer)
    assert type(ours) is KANLinear
    assert ours is not layer
    assert not is_altered(ours)
    assert ours.spline_weight is layer.spline_weight
    assert is_altered(layer)
    x = torch.linspace(-3, 3, 60).reshape(20, 3)
    torch.testing.assert_close(ours(x), layer(x))


@pytest.mark.parametrize("shape", [(12,), (1, 12)])
def test_a_layer_with_one_row_of_knots_is_adopted(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs = zoo.KANLinear(3, 2)
    x = torch.linspace(-3, 3, 60).reshape(20, 3)
    expected = theirs(x)
    theirs.grid = theirs.grid[0].reshape(shape)
    ours = adopt(theirs)
    assert ours is not None
    assert ours.grid.shape == (3, 12)
    assert theirs.grid.shape == shape
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize("kind", [KANLinear, zoo.KANLinear])
def test_repeated_knots_are_adopted_and_known(kind: Any) -> None:
    layer = kind(3, 2)
    ours = adopt(layer)
    assert ours is not None
    assert knots_rise(ours)
    layer.grid[:, :3] = layer.grid[:, 3:4].clone()
    ours = adopt(layer)
    assert ours is not None
    assert not knots_rise(ours)


class Guarded(nn.Module):
    """Has properties that fail."""

    @property
    def grid(self) -> Tensor:
        raise RuntimeError("not fitted")

    @property
    def base_activation(self) -> nn.Module:
        raise KeyError("none")


class Linear(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("module", [nn.Linear(3, 2), nn.Sequential(), Linear(), Guarded()])
def test_other_modules_are_not_adopted(module: nn.Module) -> None:
    assert adopt(module) is None
