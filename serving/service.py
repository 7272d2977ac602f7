"""The Open Inference Protocol: messages to the domain and back, one method per call.

This module knows no transport. A call may come with a `Call`, which tells how long its answer is
wanted; what goes wrong is raised as an error of serving/errors.py.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from kan_bundle import __version__
from kan_bundle.layout import MODEL_FILE
from kan_bundle.manifest import Datatype, Manifest, PruningRecord, TensorSpec
from protos import inference_pb2 as pb
from protos import model_config_pb2 as config_pb
from serving.batching import QueueFull, TooLate
from serving.dispatch import Abandoned, Dispatcher, Outcome
from serving.errors import (
    Cancelled,
    ControlRefused,
    Expired,
    ModelNotReady,
    NotOffered,
    Overloaded,
)
from serving.models.loading import LoadedModel
from serving.models.repository import Repository
from serving.observability.metrics import Counters
from serving.parameters import read_wishes
from serving.tensors import choose_outputs, decode_inputs, encode_outputs, row_bytes

_PROTOCOL = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE = _PROTOCOL.full_name
METHODS = _PROTOCOL.methods_by_name
SERVER_NAME = "kanserve"
PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ("model_configuration", "model_repository", "parameters", "statistics")

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


class Call(Protocol):
    """The caller's side of a call, as `grpc.ServicerContext` has it."""

    def time_remaining(self) -> float | None:
        """Tell for how many seconds the answer is wanted; None or infinite for ever."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have something called when the call has ended; tell whether it has not yet."""


class Answer(NamedTuple):
    """The answer to a request, and how it came about.

    Args:
        response: What the client is sent.
        model: Which has answered.
        rows: Of the request.
        parse_s: Reading its tensors, in seconds.
        outcome: Of its runs.
        ended: When they ended, by `time.perf_counter`.
    """

    response: pb.ModelInferResponse
    model: LoadedModel
    rows: int
    parse_s: float
    outcome: Outcome
    ended: float


class ModelControl(Protocol):
    """What clients may ask for where `--model-control` is explicit; see `Keeper`."""

    def load(self, name: str) -> None:
        """Serve what lies in a model's folder now."""

    def unload(self, name: str) -> None:
        """Serve a model no longer."""


class InferenceService:
    """Answers for the models of a repository. The public methods are the protocol's.

    Args:
        repository: The models.
        control: Loads and unloads models for clients; None if they may not ask for it.
        dispatcher: Runs them.
        counters: What they have answered.
        provider: Where models run, for clients to see.
        is_ready: Whether the server as a whole takes requests; it does not while it drains.
        max_message_bytes: Largest request accepted, from which ModelConfig's batch limit follows.
    """

    def __init__(
        self,
        repository: Repository,
        control: ModelControl | None,
        dispatcher: Dispatcher,
        counters: Counters,
        *,
        provider: str,
        is_ready: Callable[[], bool],
        max_message_bytes: int,
    ) -> None:
        self._repository = repository
        self._control = control
        self._dispatcher = dispatcher
        self._counters = counters
        self._provider = provider
        self._is_ready = is_ready
        self._max_message_bytes = max_message_bytes

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
        served = self._repository.served_versions(request.name)
        return pb.ModelMetadataResponse(
            name=manifest.name,
            versions=[str(version) for version in served],
            platform=PLATFORM,
            inputs=[_tensor_metadata(spec) for spec in manifest.inputs],
            outputs=[_tensor_metadata(spec) for spec in manifest.outputs],
            properties=_properties(model),
        )

    def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """Tell a model's configuration in Triton's terms."""
        model = self._repository.find(request.name, request.version)
        manifest, limits = model.manifest, model.lane.limits
        config = config_pb.ModelConfig(
            name=manifest.name,
            platform=PLATFORM,
            backend="onnxruntime",
            max_batch_size=max(1, fitting_rows(manifest, self._max_message_bytes)),
            default_model_filename=MODEL_FILE,
        )
        if limits.max_wait_s:
            config.dynamic_batching.max_queue_delay_microseconds = round(limits.max_wait_s * 1e6)
        for spec in manifest.inputs:
            config.input.add(
                name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=spec.shape[1:]
            )
        for spec in manifest.outputs:
            config.output.add(
                name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=spec.shape[1:]
            )
        return pb.ModelConfigResponse(config=config)

    def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Tell what a model, or every model, has answered in this process since it was loaded."""
        if request.version:
            models: Sequence[LoadedModel] = [self._repository.find(request.name, request.version)]
        else:
            if request.name:
                self._repository.served_versions(request.name)  # it is there
            models = [
                model
                for model in self._repository.served
                if request.name in ("", model.manifest.name)
            ]
        self._counters.settle()
        return pb.ModelStatisticsResponse(
            model_stats=[model.statistics.message() for model in models]
        )

    def infer(self, request: pb.ModelInferRequest, call: Call) -> Answer:
        """Run some rows, and wait for the answer; `start_infer` does not wait."""
        end: Future[Answer] = Future()

        def tell(found: Answer | Exception) -> None:
            if isinstance(found, Exception):
                end.set_exception(found)
            else:
                end.set_result(found)

        self.start_infer(request, call, tell)
        return end.result()

    def start_infer(
        self,
        request: pb.ModelInferRequest,
        call: Call,
        tell: Callable[[Answer | Exception], None],
    ) -> None:
        """Have some rows run, as ModelInfer does.

        Args:
            request: As it came.
            call: Whose.
            tell: Told the answer, or an error, once, from another thread.

        Raises:
            VisibleError: They will not be run.
        """
        started = time.perf_counter()
        model = self._repository.find(request.model_name, request.model_version)
        try:
            self._submit(request, model, started, call, tell)
        except Exception:
            model.statistics.count_failure(time.perf_counter() - started)
            raise

    def _submit(
        self,
        request: pb.ModelInferRequest,
        model: LoadedModel,
        started: float,
        call: Call,
        tell: Callable[[Answer | Exception], None],
    ) -> None:
        wishes = read_wishes(request)
        inputs = decode_inputs(request, model.manifest.inputs)
        chosen = choose_outputs(request, model.manifest.outputs)
        rows = len(inputs[0])
        parse_s = time.perf_counter() - started

        def answer(outcome: Outcome) -> Answer:
            ended = time.perf_counter()
            manifest = model.manifest
            response = pb.ModelInferResponse(
                model_name=manifest.name, model_version=str(manifest.version), id=request.id
            )
            encode_outputs(request, response, manifest.outputs, chosen, outcome.outputs)
            if wishes.details:
                self._add_details(response, model, outcome)
                if model.grid is not None:
                    outside = model.grid.count_outside(inputs)
                    response.parameters["out_of_grid_rows"].int64_param = outside
            return Answer(response, model, rows, parse_s, outcome, ended)

        def end(found: Outcome | Exception) -> None:
            told: Answer | Exception
            try:
                told = _told(found, call) if isinstance(found, Exception) else answer(found)
            except Exception as error:  # ours; it must not end the thread that runs everything
                told = error
            if isinstance(told, Exception):
                model.statistics.count_failure(time.perf_counter() - started)
            tell(told)

        wanted_s = call.time_remaining()
        if wishes.timeout_s is not None:
            wanted_s = wishes.timeout_s if wanted_s is None else min(wanted_s, wishes.timeout_s)
        try:
            waiting = self._dispatcher.submit(model.lane, model.run, inputs, wanted_s, end)
        except QueueFull as error:
            raise Overloaded(
                f"there is no room for another {rows} rows of model "
                f"{model.manifest.name!r}; try again in {error.retry_after_s:.3f} s",
                error.retry_after_s,
            ) from error
        except TooLate as error:
            raise Expired("the deadline leaves no time to run these rows") from error
        if not call.add_callback(lambda: self._dispatcher.give_up(model.lane, waiting)):
            self._dispatcher.give_up(model.lane, waiting)

    def RepositoryIndex(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """List every version of every model that is known."""
        response = pb.RepositoryIndexResponse()
        for name, versions in sorted(self._repository.models.items()):
            for number, version in sorted(versions.items()):
                if version.model is not None or not request.ready:
                    response.models.add(
                        name=name, version=str(number), state=version.state, reason=version.reason
                    )
        return response

    def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest
    ) -> pb.RepositoryModelLoadResponse:
        """Serve what lies in a model's folder now."""
        self._explicit(request).load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        """Serve a model no longer."""
        self._explicit(request).unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _add_details(
        self, response: pb.ModelInferResponse, model: LoadedModel, outcome: Outcome
    ) -> None:
        """Tell how an answer came about."""
        parameters = response.parameters
        parameters["model_sha256"].string_param = model.manifest.files[MODEL_FILE].sha256
        parameters["provider"].string_param = self._provider
        parameters["fused_layers"].int64_param = model.engine.fused_layers
        parameters["batch_rows"].int64_param = outcome.batch_rows
        parameters["queue_us"].int64_param = round(outcome.queue_s * 1e6)
        parameters["compute_us"].int64_param = round(outcome.compute_s * 1e6)

    def _explicit(
        self, request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest
    ) -> ModelControl:
        """Give what loads and unloads, if clients may ask for it, and in this way."""
        if self._control is None:
            raise ControlRefused(
                "models are not loaded and unloaded by clients here; a server that is started with "
                "--model-control explicit lets them"
            )
        offered = {"unload_dependents"}  # there are no dependents
        unknown = sorted(set(request.parameters) - offered)
        if unknown:
            raise NotOffered(f"parameter {unknown[0][:64]!r} is not offered")
        return self._control


def fitting_message_bytes(models: Sequence[Manifest]) -> int:
    """Choose a limit for requests that leaves room for a batch of the model with the largest rows.

    gRPC's own default, 4 MiB, is less than seven images of 3 x 224 x 224.
    """
    largest_row = max((_row_bytes(manifest) for manifest in models), default=0)
    wanted = _ROWS_THAT_FIT * largest_row + _ENVELOPE_BYTES
    return min(max(_LEAST_MESSAGE_BYTES, wanted), _LARGEST_MESSAGE_BYTES)


def fitting_rows(manifest: Manifest, max_message_bytes: int) -> int:
    """Count the rows of a model that a request of so many bytes can have."""
    return (max_message_bytes - _ENVELOPE_BYTES) // _row_bytes(manifest)


def _told(error: Exception, call: Call) -> Exception:
    """Say what a caller is told of a request that has no outcome."""
    if not isinstance(error, Abandoned | TooLate):
        return error
    left_s = call.time_remaining()
    if isinstance(error, TooLate) or (left_s is not None and left_s <= 0):
        return Expired("the deadline has passed")
    return Cancelled("cancelled")


def _row_bytes(manifest: Manifest) -> int:
    return sum(row_bytes(spec) for spec in manifest.inputs)


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
        "nodes": ", ".join(f"{count} {name}" for name, count in model.engine.placement.items()),
        **_pruning(manifest.pruning),
    }


def _pruning(record: PruningRecord | None) -> dict[str, str]:
    """Tell whether a model is another function than its source."""
    if record is None:
        return {"prune_threshold": "", "pruned_edges": ""}
    zeroed = sum(layer.zeroed for layer in record.layers)
    edges = sum(layer.edges for layer in record.layers)
    return {"prune_threshold": str(record.threshold), "pruned_edges": f"{zeroed} of {edges}"}


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )
