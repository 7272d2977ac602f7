"""The Open Inference Protocol: wire to domain and back, one method per call.

This is where errors become gRPC status codes, in one table and one place. What a client is told is
the message of a `RequestError` or `ModelNotReady`; of anything else it learns only that it was
not its fault.
"""

from collections.abc import Callable
from typing import TypeVar

import grpc
import structlog
from google.protobuf.message import Message

from kan_bundle import __version__
from kan_bundle.layout import MODEL_FILE
from kan_bundle.manifest import TensorSpec
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from protos import model_config_pb2 as config_pb
from serving.errors import InvalidRequest, ModelNotFound, ModelNotReady, ServingError
from serving.repository import Repository
from serving.tensors import choose_outputs, decode_inputs, encode_outputs

SERVER_NAME = "kanserve"
PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ("model_configuration",)

_STATUS: dict[type[ServingError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    ModelNotReady: grpc.StatusCode.UNAVAILABLE,
}

_DATA_TYPES = {"FP32": config_pb.TYPE_FP32}

_log = structlog.get_logger()
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class InferenceService(pb_grpc.GRPCInferenceServiceServicer):
    """Answers for the models of a repository.

    Args:
        repository: The models.
        is_ready: Whether the server as a whole takes requests; it does not while it drains.
        max_message_bytes: Largest request accepted, from which ModelConfig's batch limit follows.
    """

    def __init__(
        self, repository: Repository, is_ready: Callable[[], bool], max_message_bytes: int
    ) -> None:
        self._repository = repository
        self._is_ready = is_ready
        self._max_message_bytes = max_message_bytes

    def ServerLive(
        self, request: pb.ServerLiveRequest, context: grpc.ServicerContext
    ) -> pb.ServerLiveResponse:
        """Tell that the process is up."""
        return pb.ServerLiveResponse(live=True)

    def ServerReady(
        self, request: pb.ServerReadyRequest, context: grpc.ServicerContext
    ) -> pb.ServerReadyResponse:
        """Tell whether at least one model can be served and the server is not draining."""
        return pb.ServerReadyResponse(ready=self._is_ready())

    def ModelReady(
        self, request: pb.ModelReadyRequest, context: grpc.ServicerContext
    ) -> pb.ModelReadyResponse:
        """Tell whether a model, or one version of it, can be served."""
        return _answer(self._model_ready, request, context)

    def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ServerMetadataResponse:
        """Tell the server's name, version and extensions."""
        return pb.ServerMetadataResponse(
            name=SERVER_NAME, version=__version__, extensions=EXTENSIONS
        )

    def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ModelMetadataResponse:
        """Tell a model's versions and tensors."""
        return _answer(self._model_metadata, request, context)

    def ModelConfig(
        self, request: pb.ModelConfigRequest, context: grpc.ServicerContext
    ) -> pb.ModelConfigResponse:
        """Tell a model's configuration in Triton's terms."""
        return _answer(self._model_config, request, context)

    def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.ServicerContext
    ) -> pb.ModelInferResponse:
        """Run one batch."""
        return _answer(self._model_infer, request, context)

    def _model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        try:
            self._repository.find(request.name, request.version)
        except ModelNotReady:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    def _model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        manifest = self._repository.find(request.name, request.version).manifest
        ready = self._repository.ready_versions(request.name)
        return pb.ModelMetadataResponse(
            name=manifest.name,
            versions=[str(version) for version in ready],
            platform=PLATFORM,
            inputs=[_tensor_metadata(spec) for spec in manifest.inputs],
            outputs=[_tensor_metadata(spec) for spec in manifest.outputs],
            properties={
                "version": str(manifest.version),
                "model_sha256": manifest.files[MODEL_FILE].sha256,
                "source_sha256": manifest.source.sha256,
                "base_activation": manifest.base_activation,
            },
        )

    def _model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        manifest = self._repository.find(request.name, request.version).manifest
        row_bytes = sum(4 * _elements_per_row(spec) for spec in manifest.inputs)
        config = config_pb.ModelConfig(
            name=manifest.name,
            platform=PLATFORM,
            backend="onnxruntime",
            max_batch_size=max(1, self._max_message_bytes // row_bytes),
            default_model_filename=MODEL_FILE,
        )
        for spec in manifest.inputs:
            config.input.add(
                name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=spec.shape[1:]
            )
        for spec in manifest.outputs:
            config.output.add(
                name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=spec.shape[1:]
            )
        return pb.ModelConfigResponse(config=config)

    def _model_infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        model = self._repository.find(request.model_name, request.model_version)
        inputs = decode_inputs(request, model.manifest.inputs)
        chosen = choose_outputs(request, model.manifest.outputs)
        outputs = model.engine.run(inputs)
        response = pb.ModelInferResponse(
            model_name=model.manifest.name,
            model_version=str(model.manifest.version),
            id=request.id,
        )
        encode_outputs(
            request,
            response,
            [model.manifest.outputs[i] for i in chosen],
            [outputs[i] for i in chosen],
        )
        return response


def _answer(
    method: Callable[[Request], Response], request: Request, context: grpc.ServicerContext
) -> Response:
    """Call a method, and turn what it raises into a status."""
    try:
        return method(request)
    except ServingError as error:
        code = _STATUS.get(type(error))
        if code is None:
            _log.exception("request_failed", method=method.__name__)
            code, details = grpc.StatusCode.INTERNAL, "internal error; the server's log says more"
        else:
            details = str(error)
    except Exception:
        _log.exception("request_failed", method=method.__name__)
        code, details = grpc.StatusCode.INTERNAL, "internal error; the server's log says more"
    context.abort(code, details)
    raise AssertionError("abort returned")  # it never does


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )


def _elements_per_row(spec: TensorSpec) -> int:
    count = 1
    for size in spec.shape[1:]:
        count *= size
    return count
