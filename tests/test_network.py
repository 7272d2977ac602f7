"""Networks with KAN layers inside: what is exported, what is proven, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
    ParityError,
    export_checkpoint,
    export_module,
    onnx_graph,
)
from export.lowering import LoweredKANLinear
from export.torchscript import load_torchscript
from kan_bundle.integrity import record_file
from kan_bundle.manifest import TensorSpec, read_manifest
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import running
from serving.settings import Settings
from tests import zoo
from tests.conftest import run_module
from tests.states import saved
from tests.wire import infer_request, outputs_of, raw_output

# Two float32 runtimes, which add in different orders, at outputs of about 1.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}


def run_onnx(folder: Path, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [tensor.name for tensor in session.get_inputs()]
    found: list[NDArray[Any]] = session.run(None, dict(zip(names, inputs, strict=True)))
    return found


@pytest.fixture
def image() -> NDArray[Any]:
    return np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("factory", ["conv_net", "guarded_net"])
@pytest.mark.filterwarnings("ignore:.*because of layers other than KANLinear")
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
    assert "fc1.spline_weight" in names
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
        TensorSpec("tokens", "INT64", (-1, 6)),
    )
    assert [spec.name for spec in manifest.outputs] == ["logits", "pooled"]
    assert manifest.input_range is None
    with torch.no_grad():
        expected = network(torch.from_numpy(tokens), torch.from_numpy(age))

    settings = Settings(model_repository=tmp_path, grpc_port=0)
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
        (lambda y: [y, [y]], "found {'output_1': 'list'}"),
        (lambda y: [], "found nothing"),
        (lambda y: y.argmax(1), r"output output: expected floating-point numbers, found .*int64"),
        (lambda y: y.sum(), "expected one row for each row of the input, found shapes"),
        (lambda y: torch.rand_like(y), "gives different answers to the same input"),
        (lambda y: y * float("nan"), "answers every ordinary input with NaN"),
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


def test_a_module_is_given_back_as_it_was(tmp_path: Path) -> None:
    network = zoo.flattening_net()
    network.kan.layers[1].eval()
    network.requires_grad_(False)
    modes = [module.training for module in network.modules()]
    modules = list(network.modules())
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    export_module(network, name="m", output=tmp_path, input_shape=(3, 4))
    with pytest.raises(InputError):
        export_module(network, name="m", output=tmp_path, input_shape=(3, 5))
    assert [module.training for module in network.modules()] == modes
    assert list(network.modules()) == modules
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key]), key
        assert tensor.dtype == before[key].dtype
    assert torch.get_default_dtype() == torch.float32


def test_a_kan_behind_a_flatten_is_probed_at_its_knots(tmp_path: Path) -> None:
    network = zoo.flattening_net()
    manifest = export_module(network, name="m", output=tmp_path, input_shape=(3, 4))
    assert manifest.input_range is not None
    assert manifest.input_range.low == pytest.approx([-1.0] * 12)
    with np.load(tmp_path / "m" / "1" / "golden.npz") as golden:
        rows = golden["input_0"].reshape(-1, 12)
    knots = np.asarray(network.kan.layers[0].grid[0])
    assert np.isin(knots[3], rows)


@pytest.mark.parametrize("weight", ["fc1.spline_weight", "fc2.base_weight", "features.0.bias"])
@pytest.mark.filterwarnings("ignore:.*because of layers other than KANLinear")
def test_one_wrong_weight_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    write = onnx_graph.write_onnx

    def write_wrong(call: nn.Module, *arguments: Any) -> None:
        tensor = dict((*call.named_parameters(), *call.named_buffers()))[f"module.{weight}"]
        with torch.no_grad():
            kept = tensor.clone()
            tensor.view(-1)[5 % tensor.numel()] += 1e-2  # of a spline, one that x > 0 reaches
            write(call, *arguments)
            tensor.copy_(kept)

    monkeypatch.setattr("export.pipeline.write_onnx", write_wrong)
    with pytest.raises(ParityError, match="onnxruntime cpu does not compute"):
        export_module(zoo.conv_net(), name="m", output=tmp_path / "models", input_shape=(3, 8, 8))
    assert not (tmp_path / "models").exists()


@pytest.mark.filterwarnings("ignore:.*because of layers other than KANLinear")
def test_an_error_outside_the_grid_alone_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LoweredKANLinear.forward

    def clamped(self: LoweredKANLinear, x: Tensor) -> Tensor:
        return forward(self, x.clamp(-2.2, 2.2))

    monkeypatch.setattr(LoweredKANLinear, "forward", clamped)
    with pytest.raises(ParityError, match="does not compute"):
        export_module(
            zoo.flattening_net(), name="m", output=tmp_path / "models", input_shape=(3, 4)
        )


def test_true_exports_of_many_networks_pass(tmp_path: Path) -> None:
    """Noise of float32 is not an error: networks of many kinds and sizes of weights."""
    rng = np.random.default_rng(0)
    for seed in range(6):
        torch.manual_seed(seed)
        width = int(rng.integers(3, 40))
        network = nn.Sequential(
            first := nn.Linear(width, 12),
            [nn.LayerNorm(12), nn.BatchNorm1d(12), nn.Tanh()][seed % 3],
            zoo.KAN([12, 8, 4]),
            last := nn.Linear(4, 3),
        )
        with torch.no_grad():
            first.weight.mul_(10.0 ** rng.integers(-2, 3))
            last.weight.mul_(10.0 ** rng.integers(-4, 4))
        manifest = export_module(network, name=f"m{seed}", output=tmp_path, input_shape=(width,))
        assert manifest.reference == "float64"


class InsistsOnSingle(nn.Module):
    """Has a constant that does not follow the module's precision."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = zoo.KANLinear(3, 2)
        self.constant = torch.eye(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kan(x @ self.constant)
        return y


def test_a_network_without_a_float64_form_is_compared_with_itself(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot run in float64"):
        manifest = export_module(InsistsOnSingle(), name="m", output=tmp_path, input_shape=(3,))
    assert manifest.reference == "float32"


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
    settings = Settings(model_repository=tmp_path, grpc_port=0)
    with running(settings) as server, grpc.insecure_channel(server.address) as channel:
        response = GRPCInferenceServiceStub(channel).ModelInfer(infer_request("m", {"input": x}))
        np.testing.assert_allclose(raw_output(response), expected, **CLOSE)
    weights = folder / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with running(settings) as server:
        assert not server.repository.ready


BAD: dict[str, tuple[list[str], list[str]]] = {
    "factory fails": (
        ["--model", "tests.zoo:failing_net", "--input-shape", "3,8,8"],
        ["the factory fails: RuntimeError: no such dataset (zoo.py, line"],
    ),
    "factory is missing": (
        ["--model", "tests.zoo:nothing", "--input-shape", "3,8,8"],
        ["--model tests.zoo:nothing: cannot be imported: AttributeError"],
    ),
    "module is missing": (
        ["--model", "no.such:thing", "--input-shape", "3,8,8"],
        ["--model no.such:thing: cannot be imported: ModuleNotFoundError: No module named 'no'"],
    ),
    "no colon": (["--model", "tests.zoo"], ["expected package.module:factory"]),
    "makes no module": (
        ["--model", "tests.zoo:NO_NETWORK", "--input-shape", "3"],
        ["expected a torch.nn.Module, found a dict"],
    ),
    "other keys": (
        ["--model", "tests.zoo:attention_net", "--input-shape", "3,8,8"],
        [
            "missing in the file: embedding.weight",
            "unexpected in the file: features.0.weight",
        ],
    ),
    "no shape": (
        ["--model", "tests.zoo:conv_net"],
        ["what the network takes is not in the file", "--input-shape"],
    ),
    "shape does not fit": (
        ["--model", "tests.zoo:conv_net", "--input-shape", "3,9,40"],
        ["the network does not take input FP32 [batch, 3, 9, 40]", "--input-shape"],
    ),
    "batch in the shape": (
        ["--model", "tests.zoo:conv_net", "--input-shape", "1,3,8,8"],
        ["the network does not take input FP32 [batch, 1, 3, 8, 8]", "without the batch"],
    ),
    "samples are missing": (
        ["--model", "tests.zoo:conv_net", "--samples", "none.npy"],
        ["samples none.npy: cannot be read: No such file"],
    ),
    "an activation beside a network": (
        ["--model", "tests.zoo:conv_net", "--input-shape", "3,8,8", "--activation", "silu"],
        ["--activation: the network says itself"],
    ),
    "no such prefix": (
        ["--model", "tests.zoo:conv_net", "--input-shape", "3,8,8", "--prefix", "ema."],
        ["missing in the file: features.0.weight"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_gives_one_message_and_writes_nothing(tmp_path: Path, case: str) -> None:
    flags, messages = BAD[case]
    path = saved(tmp_path, zoo.conv_net().state_dict())
    done = run_module("export", path, *flags, "--output", tmp_path / "models")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("error: ") == 1
    for message in messages:
        assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_a_shape_of_one_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = zoo.conv_net().state_dict() | {"fc2.base_weight": torch.zeros(3, 6)}
    with pytest.raises(
        NetworkError, match=r"fc2\.base_weight: expected shape \(2, 6\) as in the .* \(3, 6\)"
    ):
        export_checkpoint(
            saved(tmp_path, state), output=tmp_path, model=zoo.conv_net, input_shape=(3, 8, 8)
        )


def test_weights_that_are_there_twice_must_be_chosen(tmp_path: Path) -> None:
    torch.manual_seed(5)
    ema = zoo.Flattening()
    content = {"model": zoo.flattening_net().state_dict(), "ema": ema.state_dict()}
    path = saved(tmp_path, content)
    options: dict[str, Any] = {"model": zoo.flattening_net, "input_shape": (3, 4)}
    with pytest.raises(NetworkError, match=r"2 times, behind the prefixes 'model\.', 'ema\.'"):
        export_checkpoint(path, output=tmp_path / "models", **options)
    export_checkpoint(path, output=tmp_path / "models", prefix="ema", **options)
    x = np.random.default_rng(0).standard_normal((4, 3, 4)).astype(np.float32)
    with torch.no_grad():
        expected = ema(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(
        run_onnx(tmp_path / "models" / "model" / "1", x)[0], expected, **CLOSE
    )


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = zoo.conv_net()
    with torch.no_grad():
        network.get_parameter("features.0.bias")[1] = float("nan")
    with pytest.raises(NetworkError, match=r"features\.0\.bias: 1 of 4 values are not finite"):
        export_module(network, name="m", output=tmp_path, input_shape=(3, 8, 8))


def test_what_the_users_code_prints_is_no_result(tmp_path: Path) -> None:
    path = saved(tmp_path, zoo.conv_net().state_dict())
    flags = ["--model", "tests.zoo:talking_net", "--input-shape", "3,8,8"]
    done = run_module("export", path, *flags, "--output", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/models/model/1\n"
    assert "a factory may print" in done.stderr


def test_a_kan_can_be_exported_from_python_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = kan_model.KAN([3, 4, 2])
    manifest = export_module(network, name="m", output=tmp_path)
    assert manifest == read_manifest(tmp_path / "m" / "1")
    assert manifest.source is None
    assert {record.runtime for record in manifest.parity} == {
        "eager",
        "onnxruntime cpu",
        "torchscript",
    }


def test_samples_are_compared_too_and_must_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = kan_model.KAN([3, 4, 2])
    rows = np.random.default_rng(0).standard_normal((10, 3))
    with_samples = export_module(network, name="a", output=tmp_path, samples=rows)
    without = export_module(network, name="b", output=tmp_path)
    assert with_samples.parity[0].probes == without.parity[0].probes + 4 * 10
    with pytest.raises(InputError, match=r"takes FP32 \[batch, 3\], but the input asked for is"):
        export_module(network, name="c", output=tmp_path, samples=rows[:, :2])
