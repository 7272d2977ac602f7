"""The graph as a reader and a runtime meet it."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import kan_ops
from export import ConversionError, InputError, export_module
from export.conversion.lowering import choose_forms, lower_layers
from export.conversion.onnx_graph import DEFAULT_OPSET, write_onnx
from export.conversion.precision import COARSEST, PRECISIONS
from export.inputs import read_inputs
from export.network import describe_network
from export.parts import swapped
from export.runtimes import load_onnx
from kan_bundle.manifest import Precision
from kan_model import KAN, KANLinear
from tests.conftest import GOLDENS, Shared, run_export

Make = Callable[[KAN], KAN]


def adapted(kan: KAN) -> KAN:
    for layer in kan.layers:
        layer.update_grid(torch.randn(100, layer.in_features))
    return kan


def write(
    module: nn.Module,
    path: Path,
    shape: str | None = None,
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
    *,
    inline: bool = True,
) -> onnx.ModelProto:
    network = describe_network(module.eval(), read_inputs(shape, None))
    choices = choose_forms(network)
    example = (torch.zeros(2, *network.inputs.specs[0].shape[1:]),)
    with swapped(network.call, lower_layers(network, choices, precision)):
        write_onnx(network.call, example, ["x"], ["y"], path, "m", {}, opset, inline=inline)
    return onnx.load(path)


def folded_weights(kan: KAN) -> int:
    """Count the bytes of one coefficient per function and edge, and one for the base path."""
    return sum(
        4 * layer.in_features * layer.out_features * (layer.grid_size + layer.spline_order + 1)
        for layer in kan.layers
    )


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("make", [lambda kan: kan, adapted], ids=["uniform", "adapted"])
def test_the_file_is_little_more_than_the_weights(tmp_path: Path, make: Make, inline: bool) -> None:
    kan = make(KAN([784, 64, 10]))
    path = tmp_path / "m.onnx"
    model = write(kan, path, inline=inline)
    assert path.stat().st_size <= 1.05 * folded_weights(kan)
    sizes = [t.dims for t in model.graph.initializer if np.prod(t.dims) > 784 * 12]
    assert list(map(list, sizes)) == [[784 * 9, 64]], "the weights of the large layer, once"


def shared_graph(shared: Shared, knots: str, precision: Precision) -> onnx.GraphProto:
    """Write a KAN, with uniform or adapted knots, once for all tests."""

    def make(folder: Path) -> None:
        kan = KAN([4, 5, 3])
        write(adapted(kan) if knots == "adapted" else kan, folder / "m.onnx", precision=precision)

    return onnx.load(shared(f"graph-{knots}-{precision}", make) / "m.onnx").graph


@pytest.mark.parametrize("knots", ["uniform", "adapted"])
def test_a_layer_is_one_product_with_the_names_of_the_network(shared: Shared, knots: str) -> None:
    graph = shared_graph(shared, knots, "fp32")
    nodes = {node.name: node for node in graph.node}
    assert len(nodes) == len(graph.node)
    products = [name for name, n in nodes.items() if n.op_type in ("MatMul", "Gemm")]
    assert products == ["layers.0", "layers.1"]
    assert nodes["layers.0"].input == ["layers.0/basis", "layers.0.product.weight"]
    assert nodes["layers.0/activation"].output == ["layers.0/activation"]
    readable = re.compile(r"layers\.[01](/(basis|activation))?(/[a-z]+(_\d+)?)?")
    assert all(readable.fullmatch(name) for name in nodes)
    parts = re.compile(r"layers\.[01]\.(product\.weight|basis\.knots)|constants/\d+")
    assert all(parts.fullmatch(t.name) for t in graph.initializer)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("knots", ["uniform", "adapted"])
def test_nothing_is_left_over_or_double(shared: Shared, knots: str, precision: Precision) -> None:
    graph = shared_graph(shared, knots, precision)
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
    rows = {"weight": 9} if precision == "fp32" else {"spline": 8, "base": 1}
    weights = {t.name: list(t.dims) for t in graph.initializer if "product" in t.name}
    for part, count in rows.items():
        assert weights[f"layers.0.product.{part}"] == [4 * count, 5]
        assert weights[f"layers.1.product.{part}"] == [5 * count, 3]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("knots", ["uniform", "adapted"])
def test_the_batch_is_the_only_size_without_a_number(
    shared: Shared, knots: str, precision: Precision
) -> None:
    graph = shared_graph(shared, knots, precision)
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

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.act(self.kan(self.act(x)))
            return y

    export_module(Twice(), name="m", output=tmp_path, input_shape="3", inline=True)
    graph = onnx.load(tmp_path / "m" / "1" / "model.onnx").graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {"act/tanh", "act/tanh_1", "kan/layers.0/activation", "kan"} <= set(names)
    assert [output.name for output in graph.output] == ["output"]


NEWEST = onnx.defs.onnx_opset_version()


@pytest.mark.parametrize("make", [lambda kan: kan, adapted], ids=["uniform", "adapted"])
@pytest.mark.parametrize(
    ("opset", "precision"),
    [*((opset, "fp32") for opset in (17, 18, 23, 25, NEWEST))]
    + [(opset, precision) for opset in (17, 25) for precision in ("fp16", "bf16", "int8")],
)
def test_the_opset_that_is_asked_for_is_written(
    tmp_path: Path, opset: int, precision: Precision, make: Make
) -> None:
    torch.manual_seed(0)
    kan = make(KAN([3, 2]))
    path = tmp_path / "m.onnx"
    model = write(kan, path, precision=precision, opset=opset)
    assert [(i.domain, i.version) for i in model.opset_import] == [("", opset)]
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert {"layers.0/activation", "layers.0/basis"} <= {node.name for node in model.graph.node}
    x = torch.randn(5, 3)
    off = np.abs(load_onnx(path)([x.numpy()])[0] - kan(x).detach().numpy()).max()
    assert off <= COARSEST.get(precision, 1e-5)


def test_the_command_takes_an_opset(tmp_path: Path) -> None:
    run = run_export(GOLDENS / "uniform_4x8x3.pt", "--opset", "17", "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    model = onnx.load(tmp_path / "uniform_4x8x3" / "1" / "model.onnx")
    assert [(i.domain, i.version) for i in model.opset_import] == [("", 17), ("kanserve", 1)]


@pytest.mark.parametrize("opset", [-1, 16, NEWEST + 1])
def test_an_opset_out_of_range_is_refused(tmp_path: Path, opset: int) -> None:
    with pytest.raises(InputError, match=rf"--opset: expected 17 to \d+, .* found {opset}"):
        export_module(KAN([3, 2]), name="m", output=tmp_path / "models", opset=opset)
    assert not (tmp_path / "models").exists()


def test_an_opset_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Mish(), KAN([3, 2]))  # Mish came with 18
    with pytest.raises(ConversionError, match=r"asked for opset 17, .* choose another"):
        export_module(network, name="m", output=tmp_path / "models", input_shape="3", opset=17)
    assert not (tmp_path / "models").exists()


class Branches(nn.Module):
    """Has modules of names that mean something here, a residual, and a branch on its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Linear(3, 3)
        self.product = KAN([3, 3])
        self.basis = nn.ModuleDict({"knots": nn.Linear(3, 3)})
        self.weight = nn.Parameter(torch.randn(3))
        self.module.register_parameter("module", nn.Parameter(torch.randn(3)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.module(x) * self.weight) + x
        mean = x.mean(dim=1, keepdim=True)
        y = torch.where(mean > 0, y + self.module.module, self.basis["knots"](y))
        return y


def test_names_that_mean_something_here_are_free(tmp_path: Path) -> None:
    network = Branches().eval()
    export_module(network, name="m", output=tmp_path, input_shape="3", inline=True)
    path = tmp_path / "m" / "1" / "model.onnx"
    graph = onnx.load(path).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {"module", "product", "basis.knots"} <= set(names)
    assert {"weight", "module.weight", "module.module"} <= {t.name for t in graph.initializer}
    x = torch.randn(20, 3)
    np.testing.assert_allclose(load_onnx(path)([x.numpy()])[0], network(x).detach(), atol=1e-5)


class Cond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kan = KAN([3, 3])

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.kan(x)
        y = y * y + x
        branches = (lambda v: v + v * 2, lambda v: v - v * 3)
        chosen: Tensor = torch.cond(y.sum() > -1e30, *branches, (y,))
        return chosen


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_lies_in_a_branch_keeps_its_name_to_itself(tmp_path: Path) -> None:
    network, path = Cond().eval(), tmp_path / "m.onnx"
    assert "If" in {node.op_type for node in write(network, path, "3").graph.node}
    onnx.checker.check_model(path, full_check=True)
    x = torch.randn(20, 3)
    np.testing.assert_allclose(load_onnx(path)([x.numpy()])[0], network(x).detach(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_layer_that_a_branch_reads_from_has_a_body_without_it(tmp_path: Path) -> None:
    network, path = Cond().eval(), tmp_path / "m.onnx"
    model = write(network, path, "3", inline=False)
    assert {"If", kan_ops.OPERATOR} <= {node.op_type for node in model.graph.node}
    (body,) = model.functions
    assert not {"If", kan_ops.OPERATOR} & {node.op_type for node in body.node}
    onnx.checker.check_model(path, full_check=True)
    x = torch.randn(20, 3)
    np.testing.assert_allclose(load_onnx(path)([x.numpy()])[0], network(x).detach(), atol=1e-5)


class Branching(nn.Module):
    """Has a KANLinear in a branch of `torch.cond`, once it is traced."""

    flag: torch.Tensor

    def __init__(self, *, adapted: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kan, self.other = KANLinear(4, 3), nn.Linear(4, 3)
        self.register_buffer("flag", torch.tensor(1.0))
        if adapted:
            self.kan.update_grid(torch.randn(300, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            found: torch.Tensor = torch.cond(self.flag > 0, self.kan, self.other, (x,))
            return found
        chosen = self.kan if self.flag > 0 else self.other
        return chosen(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("adapted", "remedy"), [(True, r"with --inline \(inline=True\)"), (False, "torch.where")]
)
def test_a_layer_in_a_branch_is_refused_with_what_helps(
    tmp_path: Path, adapted: bool, remedy: str
) -> None:
    network = Branching(adapted=adapted).eval()
    with pytest.raises(ConversionError, match=f"in a branch of torch.cond .* {remedy}"):
        export_module(network, name="m", output=tmp_path, input_shape=4)
    if adapted:
        done = export_module(network, name="m", output=tmp_path, input_shape=4, inline=True)
        assert done.layers[0].operator is None
