from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kan_model import KANLinear
from kan_model.activations import activation_name
from kan_model.adoption import adopt
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


class Linear(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("module", [nn.Linear(3, 2), nn.Sequential(), Linear()])
def test_other_modules_are_not_adopted(module: nn.Module) -> None:
    assert adopt(module) is None
