"""Values that a model does not accept: rejected by the server before anything is run, and by the
client before anything is sent, with the same words."""

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import serving.client.value_rules
import serving.value_rules
from kan_bundle.manifest import TensorSpec, read_manifest, write_manifest
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client import InvalidRequest, KanClient, Model, Tensor
from serving.client.bench import draw_inputs
from serving.client.value_rules import check_values
from serving.server import Server
from tests.bare import Bare
from tests.bundles import CLOSE, LOOKUP_INPUTS, look_up, publish, set_inputs, write_lookup
from tests.clients import UNIFORM, both_ways, infers
from tests.servers import Gate, gate, served
from tests.shells import Shell
from tests.wire import infer_request, outputs_of, raw_output, raw_request

__all__ = ["gate"]

INVALID = grpc.StatusCode.INVALID_ARGUMENT
TOKENS = np.array([[0, 1, 2, 3], [49, 48, 0, 7], [5, 5, 5, 5]])
X = np.array([[1.0, -1.0], [np.inf, -np.inf], [0.0, 2.0]], np.float32)
NAN = np.float32(np.nan)


def changed(array: NDArray[Any], place: tuple[int, ...], value: Any) -> NDArray[Any]:
    found = array.copy()
    found[place] = value
    return found


def outside(place: tuple[int, int], value: int, more: Any = TOKENS) -> tuple[dict[str, Any], str]:
    """Tokens with one that is not allowed, and what is said of it."""
    told = (
        f"input 'tokens', row {place[0]}, index {place[1]}: expected whole numbers from 0 to 49, "
        f"found {value}; replace such numbers, or leave such rows out"
    )
    return {"tokens": changed(more, place, value)}, told


def absent(place: tuple[int, int], value: Any = NAN) -> tuple[dict[str, Any], str]:
    """Floats with NaN among them, and what is said of it."""
    told = (
        f"input 'x', row {place[0]}, index {place[1]}: expected no NaN, found one, which this "
        "model cannot answer; fill in what is missing, or leave such rows out"
    )
    return {"x": changed(X, place, value)}, told


REJECTED = {
    "below": outside((1, 2), -1),
    "above": outside((2, 3), 50),
    "largest": outside((0, 0), 2**63 - 1),
    "smallest": outside((0, 0), -(2**63)),
    "first of two": outside((1, 3), 99, changed(TOKENS, (2, 0), -5)),
    "NaN": absent((2, 1)),
    "NaN beside infinities": absent((1, 0), -NAN),
    "both": (absent((0, 0))[0] | outside((0, 1), -1)[0], outside((0, 1), -1)[1]),
}


@dataclass(frozen=True)
class Lookup:
    """A server of the model `lookup`, which has both rules."""

    server: Server
    stub: GRPCInferenceServiceStub
    root: Path


@pytest.fixture(scope="module")
def lookup(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lookup]:
    root = tmp_path_factory.mktemp("lookup")
    write_lookup(repository / UNIFORM.name / "1", root)
    publish(repository / UNIFORM.name / "1", root / "free", 1)
    with served(root) as (server, stub):
        yield Lookup(server, stub, root)


def rejection(stub: GRPCInferenceServiceStub, request: pb.ModelInferRequest) -> str:
    with pytest.raises(grpc.RpcError) as rejected:
        stub.ModelInfer(request)
    assert rejected.value.code() is INVALID
    return str(rejected.value.details())


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize(("inputs", "told"), REJECTED.values(), ids=REJECTED)
def test_the_server_rejects_a_value_by_input_row_and_value(
    lookup: Lookup, inputs: dict[str, NDArray[Any]], told: str, typed: bool
) -> None:
    request = infer_request("lookup", {"tokens": TOKENS, "x": X} | inputs, typed=typed)
    assert told == rejection(lookup.stub, request)
    (answer,) = lookup.stub.ModelStreamInfer(iter([request]))
    assert told == answer.error_message


def test_values_up_to_the_ends_are_answered_and_no_rows_are(lookup: Lookup) -> None:
    for rows in (3, 0):
        request = infer_request("lookup", {"tokens": TOKENS[:rows], "x": X[:rows]})
        found = outputs_of(lookup.stub.ModelInfer(request))["output"]
        np.testing.assert_allclose(found, look_up(TOKENS[:rows], X[:rows]), **CLOSE)


def test_a_signalling_nan_is_rejected_too(lookup: Lookup) -> None:
    x = X.copy()
    x.view(np.uint32)[0, 1] = 0x7FA00000
    request = infer_request("lookup", {"tokens": TOKENS, "x": x})
    assert "input 'x', row 0, index 1: expected no NaN" in rejection(lookup.stub, request)


def test_the_file_alone_would_answer_what_is_rejected(repository: Path, tmp_path: Path) -> None:
    """So these tests see the rules, and no check of onnxruntime's."""
    free = tuple(replace(spec, allowed=None, rejects_nan=False) for spec in LOOKUP_INPUTS)
    write_lookup(repository / UNIFORM.name / "1", tmp_path, inputs=free)
    inputs = {"tokens": changed(TOKENS, (1, 2), -1), "x": changed(X, (2, 1), NAN)}
    with served(tmp_path) as (server, stub):
        found = outputs_of(stub.ModelInfer(infer_request("lookup", inputs)))["output"]
        assert np.isfinite(found[2]).all()
        metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="lookup"))
        assert not [key for key in metadata.properties if key.startswith("input.")]
        with KanClient(server.address) as client:
            found = client.infer("lookup", inputs)
    assert np.isfinite(found[2]).all()


def test_a_rejected_request_is_not_run_with_others(lookup: Lookup, gate: Gate) -> None:
    good = infer_request("lookup", {"tokens": TOKENS, "x": X})
    bad = infer_request("lookup", {"tokens": TOKENS - 1, "x": X})
    first = lookup.stub.ModelInfer.future(good)
    gate.await_run()
    assert "found -1" in rejection(lookup.stub, bad)
    gate.opened.set()
    np.testing.assert_allclose(outputs_of(first.result())["output"], look_up(TOKENS, X), **CLOSE)
    assert all((run >= 0).all() for run in gate.runs)


def test_an_input_of_one_number_a_row_is_named_by_its_row() -> None:
    spec = TensorSpec("t", "INT32", (-1,), allowed=(-3, 9))
    rules = serving.value_rules.value_rules([spec])
    assert rules is not None
    rules.check([np.array([-3, 9], np.int32)])
    with pytest.raises(
        Exception, match="'t', row 1: expected whole numbers from -3 to 9, found -4"
    ):
        rules.check([np.array([0, -4], np.int32)])
    assert rules.properties() == {"input.t.allowed": "-3..9"}


def test_a_rule_wider_than_its_type_excludes_nothing() -> None:
    for datatype, dtype in (("UINT8", np.uint8), ("INT32", np.int32), ("BOOL", np.bool_)):
        spec = TensorSpec("t", datatype, (-1,), allowed=(-(2**70), 2**70))  # type: ignore[arg-type]
        rules = serving.value_rules.value_rules([spec])
        assert rules is not None
        rules.check([np.ones(3, dtype)])
        check_values(np.ones(3, dtype), Tensor("t", datatype, (-1,), (-(2**70), 2**70)))


def test_inputs_without_rules_have_no_check() -> None:
    specs = [TensorSpec("t", "INT64", (-1,)), TensorSpec("u", "UINT8", (-1,), rejects_nan=True)]
    assert serving.value_rules.value_rules(specs) is None


def test_the_client_says_the_same_before_it_sends(lookup: Lookup) -> None:
    for inputs, told in REJECTED.values():
        whole = {"tokens": TOKENS, "x": X} | inputs
        said = rejection(lookup.stub, infer_request("lookup", whole))
        before = infers(lookup.server)
        for method in ("infer", "infer_all"):
            for error in both_ways(lookup.server.address, method, "lookup", whole):
                assert isinstance(error, InvalidRequest)
                assert str(error) == said == told
        assert infers(lookup.server) == before
    assert serving.client.value_rules.OUTSIDE == serving.value_rules.OUTSIDE
    assert serving.client.value_rules.NAN == serving.value_rules.NAN


def test_the_client_counts_rows_over_all_messages_of_a_batch(lookup: Lookup) -> None:
    tokens, x = np.tile(TOKENS, (20_000, 1)), np.tile(X, (20_000, 1))
    tokens[50_001, 3] = 50
    for error in both_ways(lookup.server.address, "infer", "lookup", {"tokens": tokens, "x": x}):
        assert "input 'tokens', row 50001, index 3: " in str(error)
    tokens[50_001, 3], x[59_999, 1] = 49, NAN
    for error in both_ways(lookup.server.address, "infer", "lookup", {"tokens": tokens, "x": x}):
        assert "input 'x', row 59999, index 1: " in str(error)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.int16, np.bool_])
def test_the_client_checks_values_of_other_types(lookup: Lookup, dtype: Any) -> None:
    tokens = np.ones((3, 4), dtype)
    with KanClient(lookup.server.address) as client:
        found = client.infer("lookup", {"tokens": tokens, "x": X.astype(np.float64)})
        np.testing.assert_allclose(found, look_up(tokens.astype(int), X), **CLOSE)
        if dtype is not np.bool_:
            tokens[2, 1] = 200 if dtype is np.uint8 else np.iinfo(dtype).max
            with pytest.raises(InvalidRequest, match=f"row 2, index 1: .* found {tokens[2, 1]};"):
                client.infer("lookup", {"tokens": tokens, "x": X})


def test_a_model_whose_rules_have_changed_is_described_again(
    repository: Path, tmp_path: Path
) -> None:
    folder = publish(repository / UNIFORM.name / "1", tmp_path / "m", 1)
    set_inputs(folder, input={"rejects_nan": True})
    x = changed(UNIFORM.x[:5], (3, 1), NAN)
    with served(tmp_path, model_control="explicit") as (server, stub):
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m"))
        with KanClient(server.address) as client:
            with pytest.raises(InvalidRequest, match="input 'input', row 3, index 1: "):
                client.infer("m", x)
            publish(repository / UNIFORM.name / "1", tmp_path / "m", 2)
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m"))
            assert np.isnan(client.infer("m", x)[3]).all()


def test_metadata_metrics_and_the_client_describe_the_rules(
    lookup: Lookup, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    properties = lookup.stub.ModelMetadata(pb.ModelMetadataRequest(name="lookup")).properties
    assert {key: properties[key] for key in properties if key.startswith("input.")} == {
        "input.tokens.allowed": "0..49",
        "input.x.rejects_nan": "true",
    }
    with urllib.request.urlopen(f"http://{lookup.server.metrics_address}/metrics") as response:
        text = response.read().decode()
    infos = [line for line in text.splitlines() if line.startswith("kanserve_model_info{")]
    assert ["tokens in 0..49; x without NaN" in line for line in infos] == [False, True]
    for model in both_ways(lookup.server.address, "metadata", "lookup"):
        assert [str(spec) for spec in model.inputs] == [
            "tokens INT64 [-1, 4] 0..49",
            "x FP32 [-1, 2] without NaN",
        ]
    shell = Shell(lookup.server.address, Bare(), capsysbinary)
    assert "tokens INT64 [-1, 4] 0..49, x FP32 [-1, 2] without NaN" in shell("models").decode()
    free, found = json.loads(shell("models", "--json"))
    assert found["inputs"] == [
        {"name": "tokens", "datatype": "INT64", "shape": [-1, 4], "allowed": [0, 49]},
        {"name": "x", "datatype": "FP32", "shape": [-1, 2], "rejects_nan": True},
    ]
    assert free["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 4]}]


def test_the_command_names_the_file_with_the_value(
    lookup: Lookup, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    shell = Shell(lookup.server.address, Bare(), capsysbinary)
    file = tmp_path / "x.npz"
    np.savez(file, tokens=changed(TOKENS, (1, 2), 50), x=X)
    shell("infer", "--model", "lookup", "--input", file, "--output", tmp_path / "y.npy", code=1)
    assert f"error: {file}: input 'tokens', row 1, index 2: " in shell.error
    assert not (tmp_path / "y.npy").exists()


def test_bench_draws_whole_numbers_that_are_allowed(lookup: Lookup) -> None:
    with KanClient(lookup.server.address) as client:
        model = client.metadata("lookup")
        drawn = draw_inputs(model, 500, 0)
        assert set(np.unique(drawn["tokens"])) == set(range(50))
        assert client.infer("lookup", drawn).shape == (500, 3)


@pytest.mark.parametrize(
    ("datatype", "allowed"), [("INT32", (-7, -5)), ("UINT8", (3, 2**40)), ("INT64", None)]
)
def test_bench_draws_within_the_type_too(datatype: str, allowed: tuple[int, int] | None) -> None:
    model = Model("m", ("1",), "", (Tensor("t", datatype, (-1, 9), allowed),), (), {}, None)
    drawn = draw_inputs(model, 99, 0)["t"]
    low, high = allowed or (0, 1)
    assert (drawn >= low).all()
    assert (drawn <= high).all()
    assert len(np.unique(drawn)) > 1


def test_a_bundle_of_format_1_has_no_rules(repository: Path, tmp_path: Path) -> None:
    folder = publish(repository / UNIFORM.name / "1", tmp_path / "m", 1)
    write_manifest(replace(read_manifest(folder), format=1), folder)
    with served(tmp_path) as (server, stub):
        properties = stub.ModelMetadata(pb.ModelMetadataRequest(name="m")).properties
        assert not [key for key in properties if key.startswith("input.")]
        x = changed(UNIFORM.x[:2], (0, 0), NAN)
        assert np.isnan(raw_output(stub.ModelInfer(raw_request(x, "m")))[0]).all()
        for found in both_ways(server.address, "infer", "m", x):
            assert np.isnan(found[0]).all()
