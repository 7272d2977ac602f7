"""The graph as a reader and a runtime meet it."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export import ConversionError, InputError, export_module
from export.lowering import choose_form, lowered
from export.network import describe_network
from export.onnx_graph import load_onnx, write_onnx
from kan_model import KAN
from tests import zoo


def adapted(kan: KAN) -> KAN:
    for layer in kan.layers:
        layer.update_grid(torch.randn(100, layer.in_features))
    return kan


def write(module: nn.Module, path: Path) -> onnx.ModelProto:
    network = describe_network(module.eval(), None)
    choices = {name: choose_form(layer) for name, layer in network.layers.items()}
    example = (torch.zeros(2, *network.inputs.specs[0].shape[1:]),)
    with lowered(network, choices) as call:
        write_onnx(call, example, network.inputs.specs, network.outputs, path, "m", {})
    return onnx.load(path)


def folded_weights(kan: KAN) -> int:
    """Count the bytes of one coefficient per function and edge, and one for the base path."""
    return sum(
        4 * layer.in_features * layer.out_features * (layer.grid_size + layer.spline_order + 1)
        for layer in kan.layers
    )


@pytest.mark.parametrize("make", [lambda kan: kan, adapted], ids=["uniform", "adapted"])
def test_the_file_is_little_more_than_the_weights(tmp_path: Path, make: object) -> None:
    kan = make(KAN([784, 64, 10]))  # type: ignore[operator]
    path = tmp_path / "m.onnx"
    model = write(kan, path)
    assert path.stat().st_size <= 1.05 * folded_weights(kan)
    sizes = [t.dims for t in model.graph.initializer if np.prod(t.dims) > 784 * 8]
    assert list(map(list, sizes)) == [[784 * 9, 64]], "the weights of the large layer, once"


@pytest.mark.parametrize("make", [lambda kan: kan, adapted], ids=["uniform", "adapted"])
def test_a_layer_is_one_product_with_the_names_of_the_network(tmp_path: Path, make: object) -> None:
    model = write(make(KAN([4, 5, 3])), tmp_path / "m.onnx")  # type: ignore[operator]
    nodes = {node.name: node for node in model.graph.node}
    assert len(nodes) == len(model.graph.node)
    products = [name for name, n in nodes.items() if n.op_type in ("MatMul", "Gemm")]
    assert products == ["layers.0", "layers.1"]
    assert nodes["layers.0"].input == ["layers.0/basis", "layers.0.product.weight"]
    assert nodes["layers.0/activation"].output == ["layers.0/activation"]
    readable = re.compile(r"layers\.[01](/(basis|activation))?(/[a-z]+(_\d+)?)?")
    assert all(readable.fullmatch(name) for name in nodes)
    parts = re.compile(r"layers\.[01]\.(product\.weight|basis\.(knots|centres)\.\d+)|constants/\d+")
    assert all(parts.fullmatch(t.name) for t in model.graph.initializer)


@pytest.mark.parametrize("make", [lambda kan: kan, adapted], ids=["uniform", "adapted"])
def test_nothing_is_left_over_or_double(tmp_path: Path, make: object) -> None:
    graph = write(make(KAN([4, 5, 3])), tmp_path / "m.onnx").graph  # type: ignore[operator]
    used = {name for node in graph.node for name in node.input}
    used |= {output.name for output in graph.output}
    assert {t.name for t in graph.initializer} <= used
    assert {name for node in graph.node for name in node.output} <= used
    assert not {"Constant", "Identity", "Dropout"} & {node.op_type for node in graph.node}
    values = Counter(
        (tuple(t.dims), t.data_type, onnx.numpy_helper.to_array(t).tobytes())
        for t in graph.initializer
    )
    assert set(values.values()) == {1}
    weights = [t for t in graph.initializer if t.name.endswith("weight")]
    assert [list(t.dims) for t in weights] == [[4 * 9, 5], [5 * 9, 3]]


def test_the_batch_is_the_only_size_without_a_number(tmp_path: Path) -> None:
    graph = write(KAN([4, 5, 3]), tmp_path / "m.onnx").graph
    values = [*graph.input, *graph.output, *graph.value_info]
    names = {v.name for v in values}
    assert {output for node in graph.node for output in node.output} <= names
    sizes = {
        d.dim_param
        for v in values
        for d in v.type.tensor_type.shape.dim
        if not d.HasField("dim_value")
    }
    assert sizes == {"batch"}


def test_modules_that_are_used_twice_or_nested_have_names_too(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kan = KAN([3, 3])
            self.act = nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.act(self.kan(self.act(x)))
            return y

    export_module(Twice(), name="m", output=tmp_path, input_shape="3")
    graph = onnx.load(tmp_path / "m" / "1" / "model.onnx").graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {"act/tanh", "act/tanh_1", "kan/layers.0/activation", "kan"} <= set(names)
    assert [output.name for output in graph.output] == ["output"]


@pytest.mark.parametrize("opset", [17, 18, 20, 23, onnx.defs.onnx_opset_version()])
def test_the_opset_that_is_asked_for_is_written(tmp_path: Path, opset: int) -> None:
    kan = KAN([3, 2])
    export_module(kan, name="m", output=tmp_path, opset=opset)
    path = tmp_path / "m" / "1" / "model.onnx"
    model = onnx.load(path)
    assert [(i.domain, i.version) for i in model.opset_import] == [("", opset)]
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    x = torch.randn(5, 3)
    np.testing.assert_allclose(load_onnx(path)([x.numpy()])[0], kan(x).detach(), atol=1e-6)


@pytest.mark.parametrize("opset", [-1, 16, onnx.defs.onnx_opset_version() + 1])
def test_an_opset_out_of_range_is_refused(tmp_path: Path, opset: int) -> None:
    with pytest.raises(InputError, match=rf"--opset: expected 17 to \d+, .* found {opset}"):
        export_module(KAN([3, 2]), name="m", output=tmp_path / "models", opset=opset)
    assert not (tmp_path / "models").exists()


def test_an_opset_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    """onnx has no converter of LayerNormalization to the newest opset, or of Gelu."""
    network = nn.Sequential(nn.LayerNorm(3), nn.GELU(), KAN([3, 2]))
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(ConversionError, match=f"asked for opset {newest} alone, .* choose another"):
        export_module(network, name="m", output=tmp_path / "models", input_shape="3", opset=newest)
    assert not (tmp_path / "models").exists()


def test_a_network_with_branches_is_named_and_right(tmp_path: Path) -> None:
    export_module(zoo.flattening_net(), name="m", output=tmp_path, input_shape="3,4")
    graph = onnx.load(tmp_path / "m" / "1" / "model.onnx").graph
    assert all(node.name and "node_" not in node.name for node in graph.node)
