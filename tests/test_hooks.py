"""Layers with hooks or a forward of their own: recognised by what they compute."""

import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.inputs import read_inputs
from export.network import Network, describe_network
from kan_model import KAN, KANLinear
from tests import zoo


def describe(network: nn.Module, shape: Any = None) -> Network:
    return describe_network(network.eval(), read_inputs(shape, None))


def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Look as people do, with what no tracer takes."""
    output.detach().cpu().numpy().mean()


@pytest.mark.parametrize("layer", [KANLinear, zoo.KANLinear])
@pytest.mark.parametrize("shape", [None, 4])
def test_hooks_that_only_look_leave_a_layer_what_it_is(layer: Any, shape: int | None) -> None:
    for widths in ([4, 8, 3], [4, 2]):
        network = zoo.KAN(widths, layer)
        for part in network.layers:
            part.register_forward_hook(look)
            part.register_forward_pre_hook(lambda module, inputs: None)
        found = describe(network, shape)
        assert found.inputs.specs[0].shape == (-1, 4)
        assert list(found.layers) == [f"layers.{i}" for i in range(len(widths) - 1)]
        assert not any(part._forward_hooks for part in found.layers.values())
        assert found.notes == ()
        assert found.leading == "layers.0"


def test_a_forward_of_its_own_that_computes_the_same_is_no_obstacle() -> None:
    network = KAN([4, 3, 2])
    layer = network.layers[0]
    same = types.MethodType(lambda self, x: KANLinear.forward(self, x), layer)
    vars(layer)["forward"] = same  # as an assignment does
    assert list(describe(network).layers) == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, inputs, output: 2 * output,
        lambda module, inputs, output: output.nan_to_num(),
        lambda module, inputs, output: output.clamp(-50, 50),
    ],
)
def test_a_hook_that_changes_the_answer_is_exported_with_its_layer(hook: Any) -> None:
    network = KAN([4, 3, 2])
    network.layers[0].register_forward_hook(hook)
    found = describe(network)
    assert list(found.layers) == ["layers.1"]
    assert "layers.0 holds what a KANLinear holds, but computes something else" in found.notes[0]
    assert found.inputs.specs[0].shape == (-1, 4)


class Storing(nn.Module):
    """Reads in forward what a hook has stored."""

    def __init__(self) -> None:
        super().__init__()
        self.kan, self.head = KANLinear(4, 3), nn.Linear(3, 2)
        self.seen: dict[str, Tensor] = {}
        self.kan.register_forward_hook(Keep(self.seen))

    def forward(self, x: Tensor) -> Tensor:
        self.kan(x)
        y: Tensor = self.head(self.seen["kan"])
        return y


class Keep:
    """A hook that stores the output of its layer."""

    def __init__(self, seen: dict[str, Tensor]) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen["kan"] = output


def test_a_hook_that_the_network_reads_from_keeps_its_layer_as_written() -> None:
    found = describe(Storing(), 4)
    assert found.layers == {}
    assert len(found.notes) == 1


def test_repeated_knots_of_a_lookalike_are_exported_as_written_and_noted() -> None:
    class Guarded(zoo.KANLinear):
        def basis(self, x: Tensor) -> Tensor:
            return super().basis(x).nan_to_num()

    network = nn.Sequential(Guarded(3, 2))
    layer = network[0]
    assert isinstance(layer, Guarded)
    layer.grid[:, : layer.spline_order] = layer.grid[:, layer.spline_order, None]
    found = describe(network, 3)
    assert found.layers == {}
    assert found.notes[0].startswith("0 holds what a KANLinear holds, and knots for which")


def test_the_network_runs_with_its_hooks() -> None:
    """What the files are compared with is the network as it was given."""
    network = KAN([4, 3])
    network.layers[0].register_forward_hook(lambda module, inputs, output: output + 1)
    rows = torch.from_numpy(np.zeros((2, 4), np.float32))
    with torch.no_grad():
        torch.testing.assert_close(describe(network).call(rows)[0], network(rows))
