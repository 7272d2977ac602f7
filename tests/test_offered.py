"""What is offered and what is not: every method of Triton's protocol, every parameter of a request.
Nothing is passed over in silence."""

from typing import Any

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import Server
from serving.service import SERVICE
from tests.conftest import STATE_DICTS
from tests.wire import raw_request

UNIFORM = STATE_DICTS[0].name
X = np.zeros((2, 4), np.float32)
OK, INVALID = grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
TENSORS = "tensors travel in the messages"

METHODS: dict[str, tuple[Any, grpc.StatusCode, str]] = {
    "ServerLive": (pb.ServerLiveRequest(), OK, ""),
    "ServerReady": (pb.ServerReadyRequest(), OK, ""),
    "ServerMetadata": (pb.ServerMetadataRequest(), OK, ""),
    "ModelReady": (pb.ModelReadyRequest(name=UNIFORM), OK, ""),
    "ModelMetadata": (pb.ModelMetadataRequest(name=UNIFORM), OK, ""),
    "ModelConfig": (pb.ModelConfigRequest(name=UNIFORM), OK, ""),
    "ModelStatistics": (pb.ModelStatisticsRequest(), OK, ""),
    "ModelInfer": (raw_request(X), OK, ""),
    "ModelStreamInfer": (raw_request(X), OK, ""),
    "RepositoryIndex": (pb.RepositoryIndexRequest(), OK, ""),
    "RepositoryModelLoad": (
        pb.RepositoryModelLoadRequest(model_name=UNIFORM),
        grpc.StatusCode.FAILED_PRECONDITION,
        "by clients here; a server that is started with --model-control explicit lets them",
    ),
    "RepositoryModelUnload": (
        pb.RepositoryModelUnloadRequest(model_name=UNIFORM),
        grpc.StatusCode.FAILED_PRECONDITION,
        "by clients here; a server that is started with --model-control explicit lets them",
    ),
    "SystemSharedMemoryStatus": (None, UNIMPLEMENTED, TENSORS),
    "SystemSharedMemoryRegister": (None, UNIMPLEMENTED, TENSORS),
    "SystemSharedMemoryUnregister": (None, UNIMPLEMENTED, TENSORS),
    "CudaSharedMemoryStatus": (None, UNIMPLEMENTED, TENSORS),
    "CudaSharedMemoryRegister": (None, UNIMPLEMENTED, TENSORS),
    "CudaSharedMemoryUnregister": (None, UNIMPLEMENTED, TENSORS),
    "TraceSetting": (None, UNIMPLEMENTED, "--otlp-endpoint is set when"),
    "LogSettings": (None, UNIMPLEMENTED, "--log-level is set when the server starts"),
    "NoneOfThem": (None, UNIMPLEMENTED, "Method not found!"),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_or_says_why_not(server: Server, method: str) -> None:
    message, code, details = METHODS[method]
    # Longer than a message may be, if it is not offered: nothing of it is to be read.
    raw = bytes(2**21) if message is None else message.SerializeToString()
    with grpc.insecure_channel(server.address) as channel:
        any_method: Any = channel.stream_stream(f"/{SERVICE}/{method}")
        call = any_method(iter([raw]))
        answers = []
        try:
            answers = list(call)
        except grpc.RpcError:
            assert code is not OK
        assert call.code() is code
    assert len(answers) == (code is OK)
    assert details in call.details()
    if code is UNIMPLEMENTED and method != "NoneOfThem":
        assert call.details().startswith(f"{method} is not offered: ")


SEQUENCE = "is not offered: requests know nothing of each other"
KNOWN = "there are kanserve_details, timeout, priority, triton_enable_empty_final_response"
FORM = "is not offered: the answer comes in the form of the question, raw or typed"
PARAMETERS: list[tuple[str, str, dict[str, Any], grpc.StatusCode, str]] = [
    ("request", "kanserve_details", {"bool_param": True}, OK, ""),
    ("request", "kanserve_details", {"string_param": "yes"}, INVALID, "expected true or false"),
    ("request", "kanserve_details", {}, INVALID, "expected true or false"),
    ("request", "timeout", {"int64_param": 60_000_000}, OK, ""),
    ("request", "timeout", {"uint64_param": 2**64 - 1}, OK, ""),
    ("request", "timeout", {"int64_param": 0}, OK, ""),
    ("request", "timeout", {"int64_param": -1}, INVALID, "expected microseconds, found -1"),
    ("request", "timeout", {"double_param": 1.0}, INVALID, "expected a whole number"),
    ("request", "priority", {"uint64_param": 0}, OK, ""),
    ("request", "priority", {"uint64_param": 1}, UNIMPLEMENTED, "is offered as 0 alone"),
    ("request", "priority", {"int64_param": 1}, UNIMPLEMENTED, "is offered as 0 alone"),
    ("request", "triton_enable_empty_final_response", {"bool_param": True}, OK, ""),
    ("request", "triton_enable_empty_final_response", {"bool_param": False}, OK, ""),
    (
        "request",
        "triton_enable_empty_final_response",
        {"int64_param": 1},
        INVALID,
        "expected true or false",
    ),
    ("request", "sequence_id", {"int64_param": 1}, UNIMPLEMENTED, SEQUENCE),
    ("request", "sequence_id", {"string_param": "a"}, UNIMPLEMENTED, SEQUENCE),
    ("request", "sequence_start", {"bool_param": True}, UNIMPLEMENTED, SEQUENCE),
    ("request", "sequence_end", {"bool_param": True}, UNIMPLEMENTED, SEQUENCE),
    ("request", "headers", {"string_param": "a"}, UNIMPLEMENTED, "as metadata of the call"),
    ("request", "binary_data_output", {"bool_param": True}, UNIMPLEMENTED, FORM),
    ("request", "triton_final_response", {"bool_param": True}, UNIMPLEMENTED, KNOWN),
    ("request", "kanserve_detials", {"bool_param": True}, UNIMPLEMENTED, KNOWN),
    ("request", "x" * 1000, {"bool_param": True}, UNIMPLEMENTED, f"'{'x' * 64}' is not offered"),
    ("input", "binary_data_size", {"int64_param": X.nbytes}, OK, ""),
    ("input", "binary_data_size", {"string_param": "a"}, INVALID, "expected a whole number"),
    ("input", "shared_memory_region", {"string_param": "a"}, UNIMPLEMENTED, TENSORS),
    ("input", "shared_memory_byte_size", {"int64_param": 32}, UNIMPLEMENTED, TENSORS),
    ("input", "shared_memory_offset", {"int64_param": 8}, UNIMPLEMENTED, TENSORS),
    ("input", "content_type", {"string_param": "np"}, UNIMPLEMENTED, "there are binary_data_size"),
    ("output", "classification", {"int64_param": 2}, UNIMPLEMENTED, "sort it"),
    ("output", "shared_memory_region", {"string_param": "a"}, UNIMPLEMENTED, TENSORS),
    ("output", "binary_data", {"bool_param": False}, UNIMPLEMENTED, FORM),
    ("output", "x", {"bool_param": True}, UNIMPLEMENTED, "output parameter 'x' is not offered"),
]


@pytest.mark.parametrize(("place", "name", "value", "code", "details"), PARAMETERS)
def test_every_parameter_does_something_or_is_refused(
    stub: GRPCInferenceServiceStub,
    place: str,
    name: str,
    value: dict[str, Any],
    code: grpc.StatusCode,
    details: str,
) -> None:
    request = raw_request(X)
    places: dict[str, Any] = {
        "request": request,
        "input": request.inputs[0],
        "output": request.outputs.add(name="output"),
    }
    places[place].parameters[name].CopyFrom(pb.InferParameter(**value))
    future = stub.ModelInfer.future(request)
    assert future.code() is code
    assert details in str(future.details())
    if code is not OK:
        assert f"parameter '{name[:64]}'" in str(future.details())
