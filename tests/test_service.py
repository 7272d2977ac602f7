"""The wire contract, against a real server on a free port."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from kan_bundle import __version__
from kan_bundle.manifest import TensorSpec, read_manifest
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.models.description import fitting_message_bytes
from serving.server import Server
from serving.service import SERVICE
from tests.conftest import STATE_DICTS, Golden
from tests.wire import raw_output, raw_request, typed_output, typed_request

X = np.linspace(-1.5, 1.5, 8, dtype=np.float32).reshape(2, 4)
Change = Callable[[pb.ModelInferRequest], object]


def assert_right(found: np.ndarray, golden: Golden) -> None:
    """The design's tolerance for float32, against upstream's float64 answers."""
    assert (np.abs(found - golden.y64) <= 1e-5 * np.maximum(1, np.abs(golden.y64))).all()


def test_raw_requests_give_upstreams_numbers(
    stub: GRPCInferenceServiceStub, golden: Golden
) -> None:
    response = stub.ModelInfer(raw_request(golden.x, golden.name, id="a1"))
    assert_right(raw_output(response), golden)
    assert (response.model_name, response.model_version, response.id) == (golden.name, "1", "a1")
    assert [(t.name, t.datatype) for t in response.outputs] == [("output", "FP32")]


def test_typed_requests_are_answered_typed(stub: GRPCInferenceServiceStub, golden: Golden) -> None:
    assert_right(typed_output(stub.ModelInfer(typed_request(golden.x, golden.name))), golden)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64, 1000])
def test_any_number_of_rows(stub: GRPCInferenceServiceStub, rows: int) -> None:
    x = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)
    assert raw_output(stub.ModelInfer(raw_request(x))).shape == (rows, 3)
    assert typed_output(stub.ModelInfer(typed_request(x))).shape == (rows, 3)


def test_nan_stays_nan_and_harms_no_other_row(stub: GRPCInferenceServiceStub) -> None:
    x = X.copy()
    x[0, 2] = np.nan
    found = raw_output(stub.ModelInfer(raw_request(x)))
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], raw_output(stub.ModelInfer(raw_request(X)))[1], rtol=1e-6)


def test_a_version_may_be_named(stub: GRPCInferenceServiceStub) -> None:
    assert stub.ModelInfer(raw_request(X, model_version="1")).model_version == "1"


def test_an_output_may_be_named(stub: GRPCInferenceServiceStub) -> None:
    request = raw_request(X)
    request.outputs.add(name="output")
    assert raw_output(stub.ModelInfer(request)).shape == (2, 3)


def test_server_tells_what_it_is(stub: GRPCInferenceServiceStub) -> None:
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    metadata = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("kanserve", __version__)
    assert list(metadata.extensions) == [
        "model_configuration",
        "model_repository",
        "parameters",
        "statistics",
    ]


def test_model_tells_what_it_is(stub: GRPCInferenceServiceStub, golden: Golden) -> None:
    assert stub.ModelReady(pb.ModelReadyRequest(name=golden.name)).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name=golden.name, version="1")).ready
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=golden.name))
    assert (metadata.name, list(metadata.versions)) == (golden.name, ["1"])
    assert metadata.platform == "onnxruntime_onnx"
    assert [(t.name, t.datatype, list(t.shape)) for t in (*metadata.inputs, *metadata.outputs)] == [
        ("input", "FP32", [-1, golden.widths[0]]),
        ("output", "FP32", [-1, golden.widths[-1]]),
    ]
    assert metadata.properties["base_activation"] == golden.activation
    config = stub.ModelConfig(pb.ModelConfigRequest(name=golden.name)).config
    assert config.name == golden.name
    assert config.max_batch_size == (2**20 - 1024) // (4 * golden.widths[0])
    assert [list(t.dims) for t in (*config.input, *config.output)] == [
        [golden.widths[0]],
        [golden.widths[-1]],
    ]


def first_input(change: Callable[[pb.ModelInferRequest.InferInputTensor], object]) -> Change:
    return lambda request: change(request.inputs[0])


def set_shape(*shape: int) -> Change:
    def change(request: pb.ModelInferRequest) -> None:
        request.inputs[0].shape[:] = shape

    return change


def set_raw(*contents: bytes) -> Change:
    def change(request: pb.ModelInferRequest) -> None:
        request.raw_input_contents[:] = contents

    return change


def set_field(name: str, value: str) -> Change:
    return lambda request: setattr(request, name, value)


NOT_FOUND = grpc.StatusCode.NOT_FOUND
INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD_RAW_REQUESTS = [
    pytest.param(set_field("model_name", "nope"), NOT_FOUND, "no model 'nope'", id="model"),
    pytest.param(set_field("model_name", ""), NOT_FOUND, "no model ''", id="no model"),
    pytest.param(
        set_field("model_name", "../uniform_4x8x3"), NOT_FOUND, "no model", id="path as a model"
    ),
    pytest.param(
        set_field("model_version", "2"), NOT_FOUND, "no version '2'; it serves 1", id="version"
    ),
    pytest.param(set_field("model_version", "01"), NOT_FOUND, "no version '01'", id="01"),
    pytest.param(set_field("model_version", "-1"), NOT_FOUND, "no version '-1'", id="-1"),
    pytest.param(set_field("model_version", "../1"), NOT_FOUND, "no version", id="path"),
    pytest.param(
        lambda request: request.ClearField("inputs"),
        INVALID,
        "expected inputs ['input'], found []",
        id="no input",
    ),
    pytest.param(
        first_input(lambda tensor: setattr(tensor, "name", "x")),
        INVALID,
        "expected inputs ['input'], found ['x']",
        id="tensor name",
    ),
    pytest.param(
        lambda request: request.inputs.append(request.inputs[0]),
        INVALID,
        "expected inputs ['input'], found ['input', 'input']",
        id="twice",
    ),
    pytest.param(
        first_input(lambda tensor: setattr(tensor, "datatype", "FP64")),
        INVALID,
        "expected datatype FP32, found 'FP64'",
        id="datatype",
    ),
    pytest.param(
        set_shape(2, 5), INVALID, "expected shape [-1, 4] (-1 is any number of rows)", id="width"
    ),
    pytest.param(set_shape(8), INVALID, "found [8]", id="rank"),
    pytest.param(set_shape(), INVALID, "found []", id="no shape"),
    pytest.param(set_shape(*[1] * 1000), INVALID, "and 992 more", id="absurd rank"),
    pytest.param(set_shape(-2, 4), INVALID, "found [-2, 4]", id="negative"),
    pytest.param(set_shape(-1, 4), INVALID, "found [-1, 4]", id="minus one"),
    pytest.param(
        set_shape(2**62, 4), INVALID, f"is {2**62 * 16} bytes, found 32", id="overflowing"
    ),
    pytest.param(set_raw(X.tobytes()[:-1]), INVALID, "is 32 bytes, found 31", id="a byte less"),
    pytest.param(set_raw(X.tobytes() + b"x"), INVALID, "is 32 bytes, found 33", id="a byte more"),
    pytest.param(set_raw(b""), INVALID, "is 32 bytes, found 0", id="empty"),
    pytest.param(set_raw(), INVALID, "is 8 elements, found 0", id="no contents at all"),
    pytest.param(
        set_raw(X.tobytes(), b""), INVALID, "expected 1 raw_input_contents", id="two contents"
    ),
    pytest.param(
        first_input(lambda tensor: tensor.contents.fp32_contents.extend([0.0] * 8)),
        INVALID,
        "found both",
        id="raw and typed",
    ),
    pytest.param(
        lambda request: request.outputs.add(name="y"),
        INVALID,
        "expected outputs from ['output'], each once, found ['y']",
        id="output",
    ),
]


@pytest.mark.parametrize(("change", "code", "details"), BAD_RAW_REQUESTS)
def test_bad_requests_are_told_what_was_expected_and_found(
    stub: GRPCInferenceServiceStub, change: Change, code: grpc.StatusCode, details: str
) -> None:
    request = raw_request(X)
    change(request)
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request)
    assert error.value.code() is code
    assert details in str(error.value.details())
    assert_reveals_nothing(error.value.details())
    assert raw_output(stub.ModelInfer(raw_request(X))).shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "details"),
    [
        pytest.param(
            first_input(lambda tensor: tensor.contents.fp32_contents.append(1.0)),
            "is 8 elements, found 9",
            id="too many",
        ),
        pytest.param(
            first_input(lambda tensor: tensor.contents.fp64_contents.append(1.0)),
            "FP32 belongs in contents.fp32_contents, found ['fp64_contents']",
            id="another field",
        ),
        pytest.param(set_shape(3, 4), "is 12 elements, found 8", id="shape"),
    ],
)
def test_bad_typed_requests_are_told_what_was_expected_and_found(
    stub: GRPCInferenceServiceStub, change: Change, details: str
) -> None:
    request = typed_request(X)
    change(request)
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request)
    assert error.value.code() is INVALID
    assert details in str(error.value.details())
    assert_reveals_nothing(error.value.details())


@pytest.mark.parametrize(
    "call",
    [
        lambda stub: stub.ModelReady(pb.ModelReadyRequest(name="nope")),
        lambda stub: stub.ModelMetadata(pb.ModelMetadataRequest(name="nope")),
        lambda stub: stub.ModelConfig(pb.ModelConfigRequest(name="uniform_4x8x3", version="9")),
    ],
)
def test_unknown_models_are_not_found_by_any_call(
    stub: GRPCInferenceServiceStub, call: Callable[[GRPCInferenceServiceStub], object]
) -> None:
    with pytest.raises(grpc.RpcError) as error:
        call(stub)
    assert error.value.code() is NOT_FOUND


def test_an_oversize_message_is_resource_exhausted(stub: GRPCInferenceServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(raw_request(np.zeros((2**16 + 1, 4), np.float32)))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("shape", "limit"),
    [
        ((-1, 784), 64 * 2**20),
        ((-1, 3, 224, 224), 64 * 2**20),
        ((-1, 3, 1024, 1024), 64 * 4 * 3 * 1024 * 1024 + 1024),
        ((-1, 2**28), 2**31 - 1),
    ],
)
def test_the_message_limit_follows_the_models(
    repository: Path, shape: tuple[int, ...], limit: int
) -> None:
    """Sixty-four rows of the model with the largest, 64 MiB at least, protobuf's limit at most."""
    small = read_manifest(repository / "uniform_4x8x3" / "1")
    large = replace(small, inputs=(TensorSpec("input", "FP32", shape),))
    assert fitting_message_bytes([small, large, small]) == limit


def test_bytes_that_are_no_message_are_refused_and_reveal_nothing(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            f"/{SERVICE}/ModelInfer"
        )
        with pytest.raises(grpc.RpcError) as error:
            call(b"\xff\xff\xff")
    assert error.value.code() is INVALID
    assert error.value.details() == ("expected inference.ModelInferRequest, found no such message")


def assert_reveals_nothing(details: str | None) -> None:
    for secret in ("Traceback", ".py", "/tmp", "onnxruntime", "Error", "0x"):
        assert secret not in str(details)


def test_bad_requests_never_disturb_their_neighbours(stub: GRPCInferenceServiceStub) -> None:
    """Good and bad requests of every model at once: each good one gets its own answer."""
    rng = np.random.default_rng(0)

    def one(number: int) -> None:
        golden = STATE_DICTS[number % len(STATE_DICTS)]
        if number % 3 == 0:
            request = raw_request(golden.x, golden.name)
            request.inputs[0].shape[0] += 1
            with pytest.raises(grpc.RpcError) as error:
                stub.ModelInfer(request)
            assert error.value.code() is INVALID
        else:
            response = stub.ModelInfer(raw_request(golden.x, golden.name, id=str(number)))
            assert response.id == str(number)
            assert_right(raw_output(response), golden)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, rng.permutation(200)))


@pytest.mark.parametrize("service", ["", SERVICE, "live"])
def test_health_is_serving(server: Server, service: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        assert stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(request)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_health_of_an_unknown_service_is_not_found(server: Server) -> None:
    channel = grpc.insecure_channel(server.address)
    with channel, pytest.raises(grpc.RpcError) as error:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="x"))
    assert error.value.code() is NOT_FOUND


def test_watching_an_unknown_service_tells_so_and_ends(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        request = health_pb2.HealthCheckRequest(service="x" * 1000)
        answers = list(health_pb2_grpc.HealthStub(channel).Watch(request))
    assert [a.status for a in answers] == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]


def test_many_health_watchers_take_no_thread_from_requests(
    server: Server, stub: GRPCInferenceServiceStub
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watchers = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(40)]
        for watcher in watchers:
            assert next(watcher).status == health_pb2.HealthCheckResponse.SERVING
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=10).ready
        for watcher in watchers:
            watcher.cancel()


def test_reflection_lists_every_service(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert set(services) == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_reflection_describes_every_method_and_message(server: Server) -> None:
    ours = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    with grpc.insecure_channel(server.address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        theirs = pool.FindServiceByName(SERVICE)
        assert [method.name for method in theirs.methods] == [m.name for m in ours.methods]
        for found, expected in zip(theirs.methods, ours.methods, strict=True):
            for side in ("input_type", "output_type"):
                fields = [
                    [(f.name, f.number, f.type) for f in getattr(method, side).fields]
                    for method in (found, expected)
                ]
                assert fields[0] == fields[1], found.name
