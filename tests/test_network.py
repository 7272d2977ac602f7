"""Networks with KAN layers inside: what is exported, what is proven, what is refused."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import kan_model
from export import (
    ConversionError,
    InputError,
    NetworkError,
    export_checkpoint,
    export_module,
)
from export.conversion import onnx_graph
from export.runtimes import load_torchscript
from kan_bundle.integrity import record_file
from kan_bundle.manifest import TensorSpec
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import running
from serving.settings import Settings
from tests import zoo
from tests.bundles import CLOSE, run_onnx
from tests.states import saved
from tests.wire import infer_request, outputs_of, raw_output


@pytest.fixture
def image() -> NDArray[Any]:
    return np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("factory", ["conv_net", "guarded_net"])
@pytest.mark.filterwarnings("ignore:the network itself refuses inputs of the kind nan")
@pytest.mark.filterwarnings("ignore:onnxruntime gives numbers")
def test_a_network_with_kan_layers_inside_is_exported_with_its_weights(
    tmp_path: Path, image: NDArray[Any], factory: str
) -> None:
    torch.manual_seed(7)  # other weights than the factory's own
    network = zoo.ConvNet().eval()
    path = saved(tmp_path, {"state_dict": {f"net.{k}": v for k, v in network.state_dict().items()}})
    manifest = export_checkpoint(
        path, output=tmp_path, model=f"tests.zoo:{factory}", input_shape="image=3,8,8"
    )
    assert [layer.name for layer in manifest.layers] == ["fc1", "fc2"]
    assert manifest.inputs == (TensorSpec("image", "FP32", (-1, 3, 8, 8)),)
    folder = tmp_path / "model" / "1"
    with torch.no_grad():
        expected = network(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(run_onnx(folder, image)[0], expected, **CLOSE)
    found = load_torchscript(folder / "model.ts")([image])[0]
    np.testing.assert_allclose(found, expected, **CLOSE)
    # It is our layer that is in the graph, whose weights carry the scaler.
    names = {tensor.name for tensor in onnx.load(folder / "model.onnx").graph.initializer}
    assert "fc1.product.weight" in names
    assert "fc1.spline_scaler" not in names


def test_our_own_class_is_one_of_those_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), kan_model.KAN([3, 5, 2]), nn.Softmax(-1)).eval()
    manifest = export_module(network, name="m", output=tmp_path, input_shape=(4,))
    assert [layer.name for layer in manifest.layers] == ["1.layers.0", "1.layers.1"]
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "m" / "1", x)[0], expected, **CLOSE)


def test_several_inputs_and_outputs_are_named_exported_and_served(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, size=(9, 6))
    age = rng.standard_normal((9, 1)).astype(np.float32)
    network = zoo.attention_net().eval()
    manifest = export_module(
        network, name="m", output=tmp_path, samples={"age": age, "tokens": tokens}
    )
    assert manifest.inputs == (
        TensorSpec("age", "FP32", (-1, 1)),
        TensorSpec("tokens", "INT64", (-1, 6), allowed=(0, 19)),
    )
    assert [spec.name for spec in manifest.outputs] == ["logits", "pooled"]
    assert manifest.input_range is None
    with torch.no_grad():
        expected = network(torch.from_numpy(tokens), torch.from_numpy(age))

    settings = Settings(model_repository=tmp_path, grpc_port=0, metrics_port=0)
    with running(settings) as server, grpc.insecure_channel(server.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        for typed in (False, True):
            request = infer_request("m", {"tokens": tokens, "age": age}, typed=typed)
            response = stub.ModelInfer(request)
            for name, found in outputs_of(response).items():
                np.testing.assert_allclose(found, expected[name], **CLOSE)
        with pytest.raises(grpc.RpcError, match="expected datatype INT64"):
            stub.ModelInfer(infer_request("m", {"tokens": age, "age": age}))


class Pair(NamedTuple):
    """What a network may return."""

    mean: Tensor
    spread: Tensor


class Returning(nn.Module):
    """Returns what it is told to."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.kan = zoo.KANLinear(3, 2)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.kan(x))


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda y: y, ["output"]),
        (lambda y: [y], ["output"]),
        (lambda y: (y, y.exp()), ["output_0", "output_1"]),
        (lambda y: {"a": y, "b": None}, ["a"]),
        (lambda y: Pair(y, y.abs()), ["mean", "spread"]),
        (lambda y: {"x": y}, ["x_output"]),
    ],
)
def test_outputs_are_named(tmp_path: Path, form: Callable[[Tensor], Any], names: list[str]) -> None:
    manifest = export_module(Returning(form), name="m", output=tmp_path, input_shape="x=3")
    assert [spec.name for spec in manifest.outputs] == names
    session = onnxruntime.InferenceSession(tmp_path / "m" / "1" / "model.onnx")
    assert [tensor.name for tensor in session.get_outputs()] == names


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda y: "text", "expected the network to return tensors, found {'output': 'str'}"),
        (lambda y: [], "found nothing"),
        (lambda y: y.argmax(1), r"output output: expected float32, found torch\.int64"),
        (lambda y: y.double(), r"output output: expected float32, found torch\.float64"),
        (lambda y: y.sum(), "expected one row for each row of the input, found shapes"),
        (lambda y: torch.rand_like(y), "gives different answers to the same input"),
        (lambda y: y * float("nan"), "answers every ordinary input with NaN"),
        (lambda y: y - y.mean(0), "the rows of a batch influence each other"),
    ],
)
def test_networks_that_return_something_else_are_refused(
    tmp_path: Path, form: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(NetworkError, match=message):
        export_module(Returning(form), name="m", output=tmp_path / "models", input_shape=(3,))
    assert not (tmp_path / "models").exists()


@pytest.mark.filterwarnings("ignore:.*KANLinear")
def test_a_lookalike_is_exported_as_it_is_written(tmp_path: Path, image: NDArray[Any]) -> None:
    """It holds what a KANLinear holds and clamps: replaced, it would be wrong outside the grid."""
    network = zoo.clamped_net().eval()
    with pytest.warns(UserWarning, match="fc1 holds what a KANLinear holds, but computes somethin"):
        manifest = export_module(network, name="m", output=tmp_path, input_shape=(3, 8, 8))
    assert manifest.layers == ()
    with torch.no_grad():
        expected = network(torch.from_numpy(100 * image)).numpy()
    np.testing.assert_allclose(
        run_onnx(tmp_path / "m" / "1", 100 * image)[0], expected, rtol=1e-4, atol=1e-4
    )


class Storing(nn.Module):
    """Keeps what it saw, as many do for plots, and merges weights when it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = zoo.KANLinear(12, 12), zoo.KANLinear(12, 2)
        self.b.grid = self.a.grid
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        y: Tensor = self.b(self.last)
        return y

    def train(self, mode: bool = True) -> Self:
        with torch.no_grad():
            self.b.base_weight.mul_(3.0 if mode else 1 / 3.0)
        return super().train(mode)


@pytest.mark.filterwarnings("ignore:.*was assigned during export")
def test_a_module_is_not_touched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Storing()
    network(torch.zeros(2, 12))
    last, grid = network.last, network.a.grid
    state = network.state_dict()
    before = {key: (tensor.clone(), tensor.data_ptr()) for key, tensor in state.items()}
    export_module(network, name="m", output=tmp_path, input_shape=12)
    with pytest.raises(InputError):
        export_module(network, name="m", output=tmp_path, input_shape=(3, 5))
    assert all(module.training for module in network.modules())
    assert network.last is last
    assert network.a.grid is grid
    assert network.b.grid is grid
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key][0]), key
        assert tensor.data_ptr() == before[key][1], key
    assert torch.get_default_dtype() == torch.float32


class Branching(nn.Module):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.filterwarnings("ignore:the network has no KANLinear")
def test_a_network_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"cannot be written as ONNX.*must trace"):
        export_module(Branching(), name="m", output=tmp_path / "models", input_shape=(3,))
    assert not (tmp_path / "models").exists()


def test_weights_that_do_not_fit_into_the_file_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_INLINE", 100)
    network = zoo.flattening_net()
    manifest = export_module(network, name="m", output=tmp_path, input_shape=(3, 4))
    folder = tmp_path / "m" / "1"
    assert manifest.files["model.onnx.data"] == record_file(folder / "model.onnx.data")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    outside = [
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    assert set(outside) == {"model.onnx.data"}

    x = np.random.default_rng(0).standard_normal((4, 3, 4)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    settings = Settings(model_repository=tmp_path, grpc_port=0, metrics_port=0)
    with running(settings) as server, grpc.insecure_channel(server.address) as channel:
        response = GRPCInferenceServiceStub(channel).ModelInfer(infer_request("m", {"input": x}))
        np.testing.assert_allclose(raw_output(response), expected, **CLOSE)
    weights = folder / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with running(settings) as server:
        assert not server.readiness.ready


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = zoo.conv_net()
    with torch.no_grad():
        network.get_parameter("features.0.bias")[1] = float("nan")
    with pytest.raises(NetworkError, match=r"features\.0\.bias: 1 of 4 values are not finite"):
        export_module(network, name="m", output=tmp_path, input_shape=(3, 8, 8))


def test_what_is_no_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module, found str"):
        export_module("model.pt", name="m", output=tmp_path)  # type: ignore[arg-type]


def test_samples_with_nan_are_told_of_and_do_not_count(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    x[7, 1], x[9, 0] = np.nan, np.inf
    network = kan_model.KAN([3, 4, 2])
    with pytest.warns(UserWarning, match="input: 2 of 20 rows hold NaN or infinity, row 7 first"):
        export_module(network, name="m", output=tmp_path, samples=x)


@pytest.mark.filterwarnings("ignore:the network has no KANLinear")
def test_a_layer_that_swallows_nan_is_no_kanlinear(tmp_path: Path) -> None:
    class Swallowing(zoo.KANLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.nan_to_num(x))

    with pytest.warns(UserWarning, match="computes something else"):
        manifest = export_module(
            nn.Sequential(Swallowing(3, 2)), name="m", output=tmp_path, input_shape=3
        )
    assert manifest.layers == ()
    x = np.full((1, 3), np.nan, dtype=np.float32)
    assert np.isfinite(run_onnx(tmp_path / "m" / "1", x)[0]).all()


@pytest.mark.filterwarnings("ignore:0 holds what a KANLinear holds, but computes something else")
@pytest.mark.filterwarnings("ignore:the network has no KANLinear")
def test_a_layer_with_a_hook_is_exported_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(kan_model.KANLinear(3, 2)).eval()
    network[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(UserWarning, match="0 holds what .*, but computes something else"):
        export_module(network, name="m", output=tmp_path, input_shape=3)
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "m" / "1", x)[0], expected, **CLOSE)


class Keyword(nn.Module):
    """Calls its layer by keyword, has it under two names, and a buffer named like an input."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.b = self.a = zoo.GuardedKANLinear(3, 3)
        self.register_buffer("mean", torch.ones(3))
        self.register_buffer("output", torch.ones(3))

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        y: Tensor = self.b(x=self.a(x=x)) + self.mean * m + self.output
        return y


@pytest.mark.filterwarnings("ignore:the network itself refuses inputs of the kind nan")
def test_layers_and_names_that_are_shared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Keyword().eval()
    export_module(network, name="m", output=tmp_path, input_shape=["x=3", "m=3"])
    x, m = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x), torch.from_numpy(m)).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "m" / "1", x, m)[0], expected, **CLOSE)
    export_module(network, name="n", output=tmp_path, input_shape=["output=3", "mean=3"])
    with pytest.raises(InputError, match=r"input n: expected names that forward has \(x, m\)"):
        export_module(network, name="o", output=tmp_path, input_shape=["x=3", "n=3"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(2)), r"0\.weight: has no value yet"),
        (lambda: kan_model.KANLinear(3, 2).to("meta"), "has no value yet"),
        (lambda: torch.compile(kan_model.KAN([3, 2])), r"expected a plain torch\.nn\.Module"),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), "fails on batches of 1|influence"),
    ],
)
def test_modules_that_cannot_be_run_as_they_are_are_refused(
    tmp_path: Path, make: Callable[[], nn.Module], message: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NetworkError, match=message):
            export_module(make(), name="m", output=tmp_path / "models", input_shape=3)
    assert not (tmp_path / "models").exists()


def test_a_users_class_called_kan_is_the_users(tmp_path: Path) -> None:
    """It may take images, and keep with its weights what is no tensor."""

    class KAN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = kan_model.KAN([12, 4, 2])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x.flatten(1))
            return y

        def get_extra_state(self) -> dict[str, int]:
            return {"format": 1}

    manifest = export_module(KAN(), name="m", output=tmp_path, input_shape=(3, 2, 2))
    assert manifest.inputs[0].shape == (-1, 3, 2, 2)
    assert manifest.outputs[0].shape == (-1, 2)


def test_a_layer_of_ours_whose_knots_do_not_rise_is_refused(tmp_path: Path) -> None:
    layer = kan_model.KANLinear(3, 2)
    layer.grid[1, 4] = layer.grid[1, 5]
    network = nn.Sequential(layer)
    with pytest.raises(NetworkError, match=r"0\.grid: the knots of feature 1 do not rise"):
        export_module(network, name="m", output=tmp_path, input_shape=3)


def test_a_token_beyond_the_vocabulary_is_the_clients_fault(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(20, size=(9, 6))
    samples = {"tokens": tokens, "age": np.zeros((9, 1))}
    export_module(zoo.attention_net(), name="m", output=tmp_path, samples=samples)
    request = infer_request("m", {"tokens": tokens + 20, "age": samples["age"].astype("f4")})
    settings = Settings(model_repository=tmp_path, grpc_port=0, metrics_port=0)
    with running(settings) as server, grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as error:
            GRPCInferenceServiceStub(channel).ModelInfer(request)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_behind_a_relu_no_range_of_inputs_is_claimed(tmp_path: Path) -> None:
    """On positive samples the layer sees the inputs as they are, and elsewhere it does not."""
    network = nn.Sequential(nn.ReLU(), kan_model.KANLinear(4, 2))
    samples = np.random.default_rng(0).uniform(0, 1, (50, 4)).astype(np.float32)
    manifest = export_module(network, name="m", output=tmp_path, samples=samples)
    assert manifest.input_range is None
