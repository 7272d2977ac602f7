"""The Open Inference Protocol: messages to the domain and back, one method per call.

This module knows no transport. A call may come with a `Call`, which tells how long its answer is
wanted; what goes wrong is raised as an error of serving/errors.py.
"""

import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from kan_bundle import __version__
from kan_bundle.layout import MODEL_FILE
from protos import inference_pb2 as pb
from serving.batching import QueueFull, TooLate
from serving.dispatch import Abandoned, Dispatcher, Outcome
from serving.errors import (
    Cancelled,
    ControlRefused,
    Expired,
    ModelNotReady,
    NotOffered,
    Overloaded,
    VisibleError,
)
from serving.infer_request import Arrays, InferRequest, Plan, known_names
from serving.models.description import model_config, model_metadata
from serving.models.loading import LoadedModel
from serving.models.repository import Repository
from serving.observability.metrics import Counters

_PROTOCOL = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE = _PROTOCOL.full_name
METHODS = _PROTOCOL.methods_by_name
SERVER_NAME = "kanserve"
_FINAL = "triton_final_response"  # clients of streams wait for it; there is one answer to a request
EXTENSIONS = ("model_configuration", "model_repository", "parameters", "statistics")


class Call(Protocol):
    """The caller's side of a call."""

    def time_remaining(self) -> float | None:
        """Tell for how many seconds the answer is wanted; None or infinite for ever."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have something called when the call has ended; tell whether it has not yet."""


class Answer(NamedTuple):
    """The answer to a request, and how it came about.

    Args:
        content: What the client is sent: a ModelInferResponse, or that of a stream.
        id: Of the request.
        model: Which has answered.
        rows: Of the request.
        parse_s: Reading its tensors, in seconds.
        outcome: Of its runs.
        ended: When they ended, by `time.perf_counter`.
    """

    content: bytes
    id: str
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
        return model_metadata(model, self._repository.served_versions(request.name))

    def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """Tell a model's configuration in Triton's terms."""
        model = self._repository.find(request.name, request.version)
        return pb.ModelConfigResponse(config=model_config(model, self._max_message_bytes))

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

    def is_quick(self, content: bytes) -> bool:
        """Whether a request of many bytes is read in no time, because its header is known."""
        names = known_names(content)
        try:
            model = None if names is None else self._repository.find(*names)
        except VisibleError:
            return False
        return model is not None and model.reader.find(InferRequest(content)) is not None

    def infer(self, request: InferRequest, call: Call, *, in_stream: bool = False) -> Answer:
        """Run some rows, and wait for the answer; `start_infer` does not wait."""
        told: SimpleQueue[Answer | Exception] = SimpleQueue()
        self.start_infer(request, call, told.put, in_stream=in_stream)
        found = told.get()
        if not isinstance(found, Exception):
            return found
        try:
            raise found
        finally:
            del found  # it holds this frame, and that of the engine

    def start_infer(
        self,
        request: InferRequest,
        call: Call,
        tell: Callable[[Answer | Exception], None],
        *,
        in_stream: bool = False,
        by_caller: bool = False,
    ) -> None:
        """Have some rows run, as ModelInfer does.

        Args:
            request: As it came.
            call: Whose.
            tell: Told the answer, or an error, once, from another thread.
            in_stream: Whether the answer is one of a stream.
            by_caller: Whether this thread runs short batches soon; see `Dispatcher`.

        Raises:
            VisibleError: They will not be run.
        """
        started = time.perf_counter()
        model = self._repository.find(request.model_name, request.model_version)
        try:
            plan, inputs = model.reader.read(request)
            parse_s = time.perf_counter() - started
            pending = _Pending(
                *(self, request.id, call, tell, model, plan, inputs, started, parse_s, in_stream)
            )
            self._submit(pending, by_caller=by_caller)
        except Exception:
            model.statistics.count_failure(time.perf_counter() - started)
            raise

    def _submit(self, pending: "_Pending", *, by_caller: bool) -> None:
        call, model, rows = pending.call, pending.model, pending.plan.rows
        wanted_s = call.time_remaining()
        timeout_s = pending.plan.parameters.timeout_s
        if timeout_s is not None:
            wanted_s = timeout_s if wanted_s is None else min(wanted_s, timeout_s)
        lane = model.lane
        try:
            waiting = self._dispatcher.submit(
                *(lane, model.run, pending.inputs, wanted_s, pending.end),
                by_caller=by_caller,
            )
        except QueueFull as error:
            raise Overloaded(
                f"there is no room for another {rows} rows of model "
                f"{model.manifest.name!r}; try again in {error.retry_after_s:.3f} s",
                error.retry_after_s,
            ) from error
        except TooLate as error:
            raise Expired("the deadline leaves no time to run these rows") from error
        if not call.add_callback(lambda: self._dispatcher.give_up(lane, waiting)):
            self._dispatcher.give_up(lane, waiting)

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

    def details(self, model: LoadedModel, outcome: Outcome, inputs: Arrays) -> dict[str, str | int]:
        """Tell how an answer came about."""
        found: dict[str, str | int] = {
            "model_sha256": model.manifest.files[MODEL_FILE].sha256,
            "provider": self._provider,
            "fused_layers": model.engine.fused_layers,
            "batch_rows": outcome.batch_rows,
            "queue_us": round(outcome.queue_s * 1e6),
            "compute_us": round(outcome.compute_s * 1e6),
        }
        if model.grid is not None:
            found["out_of_grid_rows"] = model.grid.count_outside(inputs)
        return found

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


class _Pending(NamedTuple):
    """A request that waits for its outcome.

    Args:
        service: Answers it.
        id: Of the request.
        call: Whose.
        tell: Told the answer, or an error.
        model: Which runs it.
        plan: Of the request.
        inputs: Its arrays.
        started: When it came, by `time.perf_counter`.
        parse_s: Reading it, in seconds.
        in_stream: Whether the answer is one of a stream.
    """

    service: InferenceService
    id: str
    call: Call
    tell: Callable[[Answer | Exception], None]
    model: LoadedModel
    plan: Plan
    inputs: Arrays
    started: float
    parse_s: float
    in_stream: bool

    def end(self, found: Outcome | Exception) -> None:
        """Tell the outcome."""
        told: Answer | Exception
        try:
            told = _told(found, self.call) if isinstance(found, Exception) else self._answer(found)
        except Exception as error:  # ours; it must not end the thread that runs everything
            told = error
        if isinstance(told, Exception):
            self.model.statistics.count_failure(time.perf_counter() - self.started)
        self.tell(told)

    def _answer(self, outcome: Outcome) -> Answer:
        ended = time.perf_counter()
        plan = self.plan
        if plan.parameters.details or self.in_stream:
            content = self._written(plan.response(self.id, outcome.outputs), outcome)
        else:
            content = plan.answer(self.id, outcome.outputs)
        return Answer(content, self.id, self.model, plan.rows, self.parse_s, outcome, ended)

    def _written(self, response: pb.ModelInferResponse, outcome: Outcome) -> bytes:
        parameters = response.parameters
        if self.plan.parameters.details:
            for name, value in self.service.details(self.model, outcome, self.inputs).items():
                if isinstance(value, str):
                    parameters[name].string_param = value
                else:
                    parameters[name].int64_param = value
        if self.in_stream:
            parameters[_FINAL].bool_param = True
            return pb.ModelStreamInferResponse(infer_response=response).SerializeToString()
        return response.SerializeToString()


def _told(error: Exception, call: Call) -> Exception:
    """Say what a caller is told of a request that has no outcome."""
    if not isinstance(error, Abandoned | TooLate):
        return error
    left_s = call.time_remaining()
    if isinstance(error, TooLate) or (left_s is not None and left_s <= 0):
        return Expired("the deadline has passed")
    return Cancelled("cancelled")
