import subprocess
import sys
from pathlib import Path

from protos import inference_pb2, model_config_pb2
from tests.conftest import ROOT

# The Open Inference Protocol: message -> field -> number, from the published specification.
STANDARD = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": 1},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": 1},
    "ModelReadyRequest": {"name": 1, "version": 2},
    "ModelReadyResponse": {"ready": 1},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {"name": 1, "version": 2, "extensions": 3},
    "ModelMetadataRequest": {"name": 1, "version": 2},
    "ModelMetadataResponse": {
        "name": 1,
        "versions": 2,
        "platform": 3,
        "inputs": 4,
        "outputs": 5,
        "properties": 6,
    },
    "ModelMetadataResponse.TensorMetadata": {"name": 1, "datatype": 2, "shape": 3},
    "ModelInferRequest": {
        "model_name": 1,
        "model_version": 2,
        "id": 3,
        "parameters": 4,
        "inputs": 5,
        "outputs": 6,
        "raw_input_contents": 7,
    },
    "ModelInferRequest.InferInputTensor": {
        "name": 1,
        "datatype": 2,
        "shape": 3,
        "parameters": 4,
        "contents": 5,
    },
    "ModelInferRequest.InferRequestedOutputTensor": {"name": 1, "parameters": 2},
    "ModelInferResponse": {
        "model_name": 1,
        "model_version": 2,
        "id": 3,
        "parameters": 4,
        "outputs": 5,
        "raw_output_contents": 6,
    },
    "ModelInferResponse.InferOutputTensor": {
        "name": 1,
        "datatype": 2,
        "shape": 3,
        "parameters": 4,
        "contents": 5,
    },
    "InferParameter": {
        "bool_param": 1,
        "int64_param": 2,
        "string_param": 3,
        "double_param": 4,
        "uint64_param": 5,
    },
    # Triton's extensions
    "ModelStatisticsRequest": {"name": 1, "version": 2},
    "ModelStatisticsResponse": {"model_stats": 1},
    "StatisticDuration": {"count": 1, "ns": 2},
    "ModelStatistics": {
        "name": 1,
        "version": 2,
        "last_inference": 3,
        "inference_count": 4,
        "execution_count": 5,
        "inference_stats": 6,
        "batch_stats": 7,
    },
    "InferStatistics": {
        "success": 1,
        "fail": 2,
        "queue": 3,
        "compute_input": 4,
        "compute_infer": 5,
        "compute_output": 6,
    },
    "InferBatchStatistics": {
        "batch_size": 1,
        "compute_input": 2,
        "compute_infer": 3,
        "compute_output": 4,
    },
    "ModelStreamInferResponse": {"error_message": 1, "infer_response": 2},
    "ModelRepositoryParameter": {
        "bool_param": 1,
        "int64_param": 2,
        "string_param": 3,
        "bytes_param": 4,
    },
    "RepositoryIndexRequest": {"repository_name": 1, "ready": 2},
    "RepositoryIndexResponse": {"models": 1},
    "RepositoryIndexResponse.ModelIndex": {"name": 1, "version": 2, "state": 3, "reason": 4},
    "RepositoryModelLoadRequest": {"repository_name": 1, "model_name": 2, "parameters": 3},
    "RepositoryModelLoadResponse": {},
    "RepositoryModelUnloadRequest": {"repository_name": 1, "model_name": 2, "parameters": 3},
    "RepositoryModelUnloadResponse": {},
    "InferTensorContents": {
        "bool_contents": 1,
        "int_contents": 2,
        "int64_contents": 3,
        "uint_contents": 4,
        "uint64_contents": 5,
        "fp32_contents": 6,
        "fp64_contents": 7,
        "bytes_contents": 8,
    },
}
METHODS = {
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    # Triton's extensions
    "ModelConfig",
    "ModelStatistics",
    "ModelStreamInfer",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
}


def test_messages_have_the_standards_names_and_numbers() -> None:
    for path, expected in STANDARD.items():
        outer, _, inner = path.partition(".")
        message = inference_pb2.DESCRIPTOR.message_types_by_name[outer]
        if inner:
            message = message.nested_types_by_name[inner]
        assert {field.name: field.number for field in message.fields} == expected, path


def test_the_service_is_the_standards() -> None:
    service = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert service.full_name == "inference.GRPCInferenceService"
    assert {method.name for method in service.methods} == METHODS
    for method in service.methods:
        streams = method.name == "ModelStreamInfer"  # of the messages of ModelInfer
        assert (method.client_streaming, method.server_streaming) == (streams, streams)
        taken = "ModelInfer" if streams else method.name
        assert method.input_type.full_name == f"inference.{taken}Request"
        assert method.output_type.full_name == f"inference.{method.name}Response"


def test_model_config_has_tritons_numbers() -> None:
    fields = model_config_pb2.ModelConfig.DESCRIPTOR.fields_by_name
    assert {name: field.number for name, field in fields.items()} == {
        "name": 1,
        "platform": 2,
        "max_batch_size": 4,
        "input": 5,
        "output": 6,
        "default_model_filename": 8,
        "dynamic_batching": 11,
        "backend": 17,
    }
    assert model_config_pb2.TYPE_FP32 == 11


def test_generating_again_gives_no_difference(tmp_path: Path) -> None:
    """The same two commands as `make protos`."""
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I."]
    out = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").glob("*.proto"))
    subprocess.run([*protoc, *out, *files], cwd=ROOT, check=True)
    subprocess.run(
        [*protoc, f"--grpc_python_out={tmp_path}", "protos/inference.proto"], cwd=ROOT, check=True
    )
    generated = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "protos").glob("*_pb2*")}
    assert generated == committed
