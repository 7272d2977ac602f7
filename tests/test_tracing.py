"""What tracing a network leaves behind, and how its failures are told."""

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import kan_ops
from export import ConversionError, export_module
from export.conversion.lowering import choose_forms, lower_layers
from export.conversion.onnx_graph import write_onnx
from export.conversion.torchscript import write_torchscript
from export.inputs import read_inputs
from export.network import describe_network
from export.parts import restored_attributes, swapped
from kan_model import KANLinear
from tests.networks import written


class ManyLayers(nn.Module):
    """A layer for each column, over rows made inside; columns are filled in place."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KANLinear(2, 1) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        out = torch.zeros(rows, len(self.layers))
        for i, layer in enumerate(self.layers):
            column = torch.zeros(rows)
            column += layer(x).view(rows)
            out[:, i] = column
        return out


def test_many_layers_are_a_node_each_and_no_body_reads_from_another(tmp_path: Path) -> None:
    network = describe_network(ManyLayers(17).eval(), read_inputs(2, None))
    path = tmp_path / "m.onnx"
    with swapped(network.call, lower_layers(network, choose_forms(network))):
        write_onnx(network.call, (torch.zeros(2, 2),), ["x"], ["y"], path, "m", {})
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    nodes = [node for node in model.graph.node if node.op_type == kan_ops.OPERATOR]
    assert len(nodes) == len(model.functions) == 17
    assert [value.name for value in model.graph.input] == ["x"]
    known = {"x", *(t.name for t in model.graph.initializer)}
    for node in model.graph.node:
        assert set(node.input) - {""} <= known
        known |= set(node.output)


class Assigning(nn.Module):
    """Keeps what it computes, in an attribute and in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KANLinear(3, 2)
        self.history: list[Any] = []
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.mean(1, keepdim=True)
        self.seen["x"] = x
        self.history.append(self.mean)
        y: Tensor = self.kan(x - self.mean) + self.mean
        return y


def test_a_trace_leaves_no_stand_in_of_a_tensor_behind(tmp_path: Path) -> None:
    network = describe_network(Assigning().eval(), read_inputs(3, None))
    module = network.call.module
    assert isinstance(module, Assigning)
    before = {**vars(module), "history": list(module.history), "seen": dict(module.seen)}
    rows = (torch.zeros(2, 3),)
    write_onnx(network.call, rows, ["x"], ["y"], tmp_path / "m.onnx", "m", {}, inline=True)
    write_torchscript(network.call, rows, tmp_path / "m.ts", {})
    assert vars(module).keys() == before.keys()
    for name, value in before.items():
        found = vars(module)[name]
        if name in ("history", "seen"):
            assert len(found) == len(value)
            assert all(a is b for a, b in zip(found, value, strict=True))
        else:
            assert found is value, name
    assert type(module.mean) is Tensor


def test_attributes_are_restored_after_a_failure() -> None:
    module = Assigning()

    def change() -> None:
        module.mean = torch.zeros(1)
        module.history.append(1)
        del module.seen
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), restored_attributes(module):
        change()
    assert not hasattr(module, "mean")
    assert (module.history, module.seen) == ([], {})


def test_the_callers_module_is_the_same_afterwards(tmp_path: Path) -> None:
    network = Assigning()
    network(torch.zeros(2, 3))
    hook = network.kan.register_forward_hook(lambda module, inputs, output: None)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    attributes, history, seen = dict(vars(network)), list(network.history), dict(network.seen)
    own = copy.copy(vars(network.kan))
    export_module(network, name="m", output=tmp_path, input_shape=3)
    assert all(module.training for module in network.modules())
    assert vars(network).keys() == attributes.keys()
    assert all(vars(network)[name] is value for name, value in attributes.items())
    assert all(a is b for a, b in zip(network.history, history, strict=True))
    assert network.seen.keys() == seen.keys()
    assert network.seen["x"] is seen["x"]
    assert all(vars(network.kan)[name] is value for name, value in own.items())
    assert list(network.kan._forward_hooks) == [hook.id]
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@pytest.mark.filterwarnings("ignore:the network has no KANLinear")
@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda s, x: x if x.sum() > 0 else -x, "must trace: tensor operations only, no branch"),
        (lambda s, x: x + torch.zeros(len(x), 1), r"x\.shape\[0\], not from len\(x\)"),
        (lambda s, x: torch.special.bessel_j0(x), r"no form of prims\.bessel_j0\.default there"),
    ],
)
def test_what_onnx_cannot_hold_is_said_of_the_network(
    tmp_path: Path, form: Any, message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        export_module(written(form), name="m", output=tmp_path, input_shape=3)


def test_a_fault_after_the_trace_is_not_blamed_on_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("Nodes in a graph must be topologically sorted")

    monkeypatch.setattr("onnx.checker.check_model", fail)
    with pytest.raises(ConversionError, match=r"topologically sorted; .* fault of the exporter"):
        export_module(KANLinear(3, 2), name="m", output=tmp_path, input_shape=3)
