"""KANLinear layers as one node with a body: the same file with the library and without."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import kan_ops
from export import export_checkpoint, export_module
from export.conversion.onnx_graph import DEFAULT_OPSET
from export.runtimes import load_onnx
from kan_bundle.manifest import Manifest
from kan_model import KAN, KANLinear
from tests.conftest import GOLDENS, run_export
from tests.operators import Operator, make_knots, run, session

FUSED = "onnxruntime cpu, fused"


def read(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "m" / "1" / "model.onnx")


def nodes(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def require_both_ways(network: nn.Module, folder: Path, *inputs: Tensor) -> onnx.ModelProto:
    """Run the file's bodies, and the operator, and compare each with the network in float64."""
    path = folder / "m" / "1" / "model.onnx"
    arrays = [x.numpy() for x in inputs]
    with torch.no_grad():
        exact = network.double()(*(x.double() for x in inputs)).numpy()
    network.float()
    for fused in (False, True):
        np.testing.assert_allclose(load_onnx(path, fused=fused)(arrays)[0], exact, atol=2e-5)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model


def layer_names(model: onnx.ModelProto) -> list[str]:
    return [node.overload for node in model.graph.node if node.op_type == kan_ops.OPERATOR]


@pytest.mark.parametrize("opset", [17, DEFAULT_OPSET, 25, onnx.defs.onnx_opset_version()])
def test_a_kan_is_one_node_a_layer(tmp_path: Path, opset: int) -> None:
    torch.manual_seed(0)
    kan = KAN([4, 6, 3])
    manifest = export_module(kan, name="m", output=tmp_path, opset=opset)
    model = require_both_ways(kan, tmp_path, torch.randn(20, 4))
    assert nodes(model) == [kan_ops.OPERATOR] * 2
    assert [node.name for node in model.graph.node] == ["layers.0", "layers.1"]
    assert layer_names(model) == ["layers.0", "layers.1"]
    assert [(f.name, f.overload) for f in model.functions] == [
        (kan_ops.OPERATOR, "layers.0"),
        (kan_ops.OPERATOR, "layers.1"),
    ]
    assert {t.name for t in model.graph.initializer} == {
        *(f"layers.{i}.{tensor}" for i in (0, 1) for tensor in ("basis.knots", "product.weight"))
    }
    assert {o.domain: o.version for o in model.opset_import} == {"": opset, kan_ops.DOMAIN: 1}
    for function in model.functions:
        assert {o.domain: o.version for o in function.opset_import}[""] == opset
        assert list(function.input) == ["x", "knots", "weight"]
        assert list(function.output) == ["y"]
        assert not {node.domain for node in function.node} - {""}
    assert {layer.operator for layer in manifest.layers} == {kan_ops.OPERATOR}
    assert parity(manifest)[FUSED] <= 1e-5


def parity(manifest: Manifest) -> dict[str, float]:
    return {record.runtime: record.max_relative for record in manifest.parity}


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_the_operator_takes_over_from_the_body(level: str) -> None:
    """A body that answers 7 tells which of the two has run."""
    operator = Operator(
        3,
        make_knots(2, 5, 3, adapted=True, rng=np.random.default_rng(0)),
        np.random.default_rng(1).standard_normal((9, 2, 4)).astype(np.float32),
    )
    model = operator.model()
    model.graph.node[0].overload = "layers.0"
    seven = helper.make_tensor("value", TensorProto.FLOAT, [1], [7.0])
    size = helper.make_tensor("value", TensorProto.INT64, [2], [3, 4])
    body = [
        helper.make_node("Constant", [], ["size"], value=size),
        helper.make_node("ConstantOfShape", ["size"], ["y"], value=seven),
    ]
    function = helper.make_function(
        kan_ops.DOMAIN,
        kan_ops.OPERATOR,
        ["x", "knots", "weight"],
        ["y"],
        body,
        [helper.make_opsetid("", 20)],
        [attribute.name for attribute in model.graph.node[0].attribute],
        overload="layers.0",
    )
    model.functions.append(function)
    x = np.zeros((3, 2), np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    raw = model.SerializeToString()
    with_body = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(with_body.run(None, {"x": x})[0], np.full((3, 4), 7.0))
    kan_ops.register(options)
    fused = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(fused.run(None, {"x": x})[0], operator.answers(x)[0], rtol=1e-5)

    # An operator of another version has another name, and the library lets its body run.
    model.graph.node[0].op_type = function.name = model.functions[0].name = "KANLinear2"
    np.testing.assert_array_equal(run(model, x), np.full((3, 4), 7.0))


def test_layers_that_look_alike_keep_their_own_bodies(tmp_path: Path) -> None:
    """Equal knots are stored once, and say nothing of the layer."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = KANLinear(4, 4)
            self.second = KANLinear(4, 4, base_activation=nn.Tanh)
            self.unused = KANLinear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.first(x) + self.second(x) + self.first(0.5 * x)
            return y

    network = Three()
    manifest = export_module(network, name="m", output=tmp_path, input_shape=4)
    assert {layer.name: layer.operator for layer in manifest.layers} == {
        "first": kan_ops.OPERATOR,
        "second": kan_ops.OPERATOR,
        "unused": None,
    }
    model = require_both_ways(network, tmp_path, torch.randn(9, 4))
    assert sorted(layer_names(model)) == ["first", "first", "second"]
    assert sorted(function.overload for function in model.functions) == ["first", "second"]
    names = [initializer.name for initializer in model.graph.initializer]
    assert len(names) == len(set(names))
    assert not any("unused" in name for name in names)


def test_tokens_are_rows(tmp_path: Path) -> None:
    """The rows of a body are not the batch, which a runtime plans its memory by."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.kan = KANLinear(4, 4)
            self.head = KANLinear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head((x + self.kan(x)).flatten(1))
            return y + x.mean(dim=1)

    network = Tokens()
    export_module(network, name="m", output=tmp_path, input_shape=(3, 4))
    model = require_both_ways(network, tmp_path, torch.randn(7, 3, 4))
    assert sorted(layer_names(model)) == ["head", "kan"]
    sizes = [v.type.tensor_type for function in model.functions for v in function.value_info]
    assert not any(tensor.HasField("shape") for tensor in sizes)


def test_a_network_may_be_one_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = KANLinear(3, 5)
    export_module(network, name="m", output=tmp_path, input_shape=3)
    model = require_both_ways(network, tmp_path, torch.randn(9, 3))
    assert nodes(model) == [kan_ops.OPERATOR]


class Swish2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KANLinear(3, 2, spline_order=0),
        lambda: KANLinear(3, 2, base_activation=Swish2),
        lambda: KANLinear(3, 2, base_activation=lambda: nn.GELU(approximate="tanh")),
    ],
    ids=["order 0", "own activation", "approximate GELU"],
)
def test_what_the_operator_does_not_know_is_written_as_before(
    tmp_path: Path, make: Callable[[], KANLinear]
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(make(), KANLinear(2, 2))
    manifest = export_module(network, name="m", output=tmp_path, input_shape=3)
    model = require_both_ways(network, tmp_path, torch.randn(9, 3))
    assert [layer.operator for layer in manifest.layers] == [None, kan_ops.OPERATOR]
    assert layer_names(model) == ["1"]


@pytest.mark.filterwarnings("ignore:.*does not say which base activation")
def test_the_command_writes_inline(tmp_path: Path) -> None:
    done = run_export(GOLDENS / "uniform_4x8x3.pt", "--inline", "--output", tmp_path, "--name", "m")
    assert done.returncode == 0, done.stderr
    model = read(tmp_path)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert [o.domain for o in model.opset_import] == [""]
    assert "fused" not in done.stderr


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_below_float32_layers_are_standard_operators(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    manifest = export_module(KAN([4, 3]), name="m", output=tmp_path, precision=precision)  # type: ignore[arg-type]
    assert not read(tmp_path).functions
    assert [layer.operator for layer in manifest.layers] == [None]
    assert FUSED not in parity(manifest)


def test_without_the_library_only_the_bodies_are_compared_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kan_ops, "_LIBRARY", "missing.so")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="what kan_ops computes is not compared"):
        manifest = export_module(KAN([4, 3]), name="m", output=tmp_path)
    assert FUSED not in parity(manifest)
    assert [layer.operator for layer in manifest.layers] == [kan_ops.OPERATOR]


def test_an_operator_that_is_wrong_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two ways are compared one by one: here they are given different activations."""
    from export.conversion import lowering

    attributes = lowering._attributes
    monkeypatch.setattr(
        lowering, "_attributes", lambda *of: {**attributes(*of), "activation": "tanh"}
    )
    torch.manual_seed(0)
    with pytest.raises(Exception, match="onnxruntime cpu, fused does not compute what"):
        export_module(KAN([4, 3]), name="m", output=tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_goldens_of_upstream_run_fused(tmp_path: Path) -> None:
    checkpoint = GOLDENS / "adapted_5x7x3.pt"
    manifest = export_checkpoint(checkpoint, output=tmp_path, name="m", activation="silu")
    assert parity(manifest)[FUSED] <= 2 * parity(manifest)["eager"]
    loaded = session(read(tmp_path))
    assert loaded.get_inputs()[0].shape == ["batch", 5]
