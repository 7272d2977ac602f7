"""The Open Inference Protocol: wire to domain and back, one method per call.

This is where errors become gRPC status codes, in one table and one place. What a client is told is
the message of a `VisibleError`; of anything else it learns only that it was not its fault.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from kan_bundle import __version__
from kan_bundle.layout import MODEL_FILE
from kan_bundle.manifest import Datatype, Manifest, TensorSpec
from protos import inference_pb2 as pb
from protos import model_config_pb2 as config_pb
from serving.errors import InvalidRequest, ModelNotFound, ModelNotReady, VisibleError
from serving.repository import LoadedModel, Repository
from serving.tensors import choose_outputs, decode_inputs, encode_outputs, row_bytes

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
SERVER_NAME = "kanserve"
PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ("model_configuration",)

_STATUS: dict[type[VisibleError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    ModelNotReady: grpc.StatusCode.UNAVAILABLE,
}
_DATA_TYPES: dict[Datatype, config_pb.DataType] = {
    "FP32": config_pb.TYPE_FP32,
    "INT64": config_pb.TYPE_INT64,
    "INT32": config_pb.TYPE_INT32,
    "UINT8": config_pb.TYPE_UINT8,
    "BOOL": config_pb.TYPE_BOOL,
}
_ENVELOPE_BYTES = 1024  # of a request beside its tensors: names, shape, id
_LEAST_MESSAGE_BYTES = 64 * 2**20
_LARGEST_MESSAGE_BYTES = 2**31 - 1  # protobuf's
_ROWS_THAT_FIT = 64
_PROBES = ("ServerLive", "ServerReady")  # must be answered however busy the server is

_log = structlog.get_logger()


class InferenceService:
    """Answers for the models of a repository. The public methods are the protocol's.

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

    def handlers(self, probe_pool: Executor) -> grpc.GenericRpcHandler:
        """Make the handlers of every method of the service, for `add_generic_rpc_handlers`.

        Requests are parsed in the handler, because bytes that are no message are the client's
        fault and gRPC's own parsing would call them ours.

        Args:
            probe_pool: Runs what must be answered however busy the server is.
        """
        methods = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
        handlers: dict[str, Any] = {}
        for method in methods:
            behavior = _answering(getattr(self, method.name), GetMessageClass(method.input_type))
            if method.name in _PROBES:
                behavior.experimental_thread_pool = probe_pool  # type: ignore[attr-defined]
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                behavior, response_serializer=GetMessageClass(method.output_type).SerializeToString
            )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def ServerLive(self, request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """Tell that the process is up."""
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """Tell whether at least one model can be served and the server is not draining."""
        return pb.ServerReadyResponse(ready=self._is_ready())

    def ServerMetadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Tell the server's name, version and extensions."""
        return pb.ServerMetadataResponse(
            name=SERVER_NAME, version=__version__, extensions=EXTENSIONS
        )

    def ModelReady(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """Tell whether a model, or one version of it, can be served."""
        try:
            self._repository.find(request.name, request.version)
        except ModelNotReady:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Tell a model's versions and tensors."""
        model = self._repository.find(request.name, request.version)
        manifest = model.manifest
        ready = self._repository.ready_versions(request.name)
        return pb.ModelMetadataResponse(
            name=manifest.name,
            versions=[str(version) for version in ready],
            platform=PLATFORM,
            inputs=[_tensor_metadata(spec) for spec in manifest.inputs],
            outputs=[_tensor_metadata(spec) for spec in manifest.outputs],
            properties=_properties(model),
        )

    def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """Tell a model's configuration in Triton's terms."""
        manifest = self._repository.find(request.name, request.version).manifest
        one_row = _row_bytes(manifest)
        config = config_pb.ModelConfig(
            name=manifest.name,
            platform=PLATFORM,
            backend="onnxruntime",
            max_batch_size=max(1, (self._max_message_bytes - _ENVELOPE_BYTES) // one_row),
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

    def ModelInfer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """Run one batch."""
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


def fitting_message_bytes(models: Sequence[Manifest]) -> int:
    """Choose a limit for requests that leaves room for a batch of the model with the largest rows.

    gRPC's own default, 4 MiB, is less than seven images of 3 x 224 x 224.
    """
    largest_row = max((_row_bytes(manifest) for manifest in models), default=0)
    wanted = _ROWS_THAT_FIT * largest_row + _ENVELOPE_BYTES
    return min(max(_LEAST_MESSAGE_BYTES, wanted), _LARGEST_MESSAGE_BYTES)


def _row_bytes(manifest: Manifest) -> int:
    return sum(row_bytes(spec) for spec in manifest.inputs)


def _answering(
    method: Callable[[Any], Message], request_type: type[Message]
) -> Callable[[bytes, grpc.ServicerContext], Message]:
    """Wrap a method for gRPC: parse the request, and turn what is raised into a status."""

    def answer(raw: bytes, context: grpc.ServicerContext) -> Message:
        request = None
        try:
            request = request_type.FromString(raw)
            return method(request)
        except DecodeError:
            code = grpc.StatusCode.INVALID_ARGUMENT
            details = f"expected {request_type.DESCRIPTOR.full_name}, found no such message"
        except VisibleError as error:
            code, details = _STATUS[type(error)], str(error)
        except Exception:
            _log.exception("request_failed", method=method.__name__, **_identity(request))
            code, details = grpc.StatusCode.INTERNAL, "internal error; the server's log says more"
        context.abort(code, details)
        raise AssertionError("abort returned")  # it never does

    return answer


def _identity(request: Any) -> dict[str, str]:
    """Say which request it was, for the log."""
    if not isinstance(request, pb.ModelInferRequest):
        return {}
    return {"model": request.model_name, "version": request.model_version, "id": request.id[:128]}


def _properties(model: LoadedModel) -> dict[str, str]:
    """Tell where a model comes from, and how it runs."""
    manifest = model.manifest
    activations = sorted({layer.base_activation for layer in manifest.layers})
    return {
        "version": str(manifest.version),
        "model_sha256": manifest.files[MODEL_FILE].sha256,
        "source_sha256": manifest.source.sha256 if manifest.source else "",
        "base_activation": ", ".join(activations),
        "kan_layers": str(len(manifest.layers)),
        "fused_layers": str(model.engine.fused_layers),
    }


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )
