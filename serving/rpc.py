"""gRPC's side of the service: which thread answers what, and who gets no answer.

Requests to run a model have no threads (see arrivals.py), streams have one each. Who comes when
there are too many, or may not come, is refused at the door: in gRPC's own thread, before the
message is read. What must be answered however busy the server is has threads of its own.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from protos import inference_pb2 as pb
from serving import arrivals
from serving.access import NOT_ALLOWED, UNKNOWN_CALLER, Access, Group, certificate_names
from serving.arrivals import Arrival, Arrivals, Refusals
from serving.deadline import Deadline
from serving.errors import Forbidden, NotOffered, Overloaded, Unauthenticated, VisibleError
from serving.failures import Failure, failure_of
from serving.observability.telemetry import Record, Telemetry
from serving.pools import Behavior, CountingPool, Inline
from serving.service import METHODS, SERVICE, Answer, InferenceService

_FINAL = "triton_final_response"  # clients of streams wait for it; there is one answer to a request
_STRICT = ("triton_grpc_error", "true")  # a stream is to end with a status at the first error

_INFER, _STREAM = f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ModelStreamInfer"
_CONTROL = ("RepositoryModelLoad", "RepositoryModelUnload")
_NOT_OFFERED = {  # of Triton's methods
    **{
        f"{kind}SharedMemory{verb}": "tensors travel in the messages"
        for kind in ("System", "Cuda")
        for verb in ("Status", "Register", "Unregister")
    },
    "TraceSetting": "--otlp-endpoint is set when the server starts",
    "LogSettings": "--log-level is set when the server starts",
}
_OPEN = ("ServerLive", "ServerReady")  # to everybody, as health is
_AUTHORIZATION = "authorization"
_PROBE_THREADS = 2
_READER_THREADS = 2
_LARGE_BYTES = 2**17  # of a message that takes a millisecond to read, which is long for one thread


class RpcHandlers(grpc.GenericRpcHandler):
    """The handlers of every method of the service, for `add_generic_rpc_handlers`.

    Messages are parsed in the handlers, because bytes that are no message are the client's fault
    and gRPC's own parsing would call them ours.

    Args:
        service: What answers.
        telemetry: Told how every call ended.
        access: Who may call what; None if everybody may call everything.
        max_requests: Most requests in the server at a time, beside those of streams.
        max_streams: Most streams open at a time.
        is_full: Tells whether requests are to be refused before they are read.
        retry_after_s: Tells when there will be room again, in seconds.
    """

    def __init__(
        self,
        service: InferenceService,
        telemetry: Telemetry,
        access: Access | None,
        max_requests: int,
        max_streams: int,
        is_full: Callable[[], bool],
        retry_after_s: Callable[[], float],
    ) -> None:
        self._service = service
        self._telemetry = telemetry
        self._access = access
        self._groups: dict[str, Group] = {
            f"/{SERVICE}/{name}": "admin" if name in _CONTROL else "inference"
            for name in METHODS
            if name not in _OPEN
        }
        self._is_full = is_full
        self._requests: Arrivals | CountingPool = (
            Arrivals(self._begin, max_requests)
            if arrivals.SUPPORTED
            else CountingPool(max_requests, "request")
        )
        self._streams = CountingPool(max_streams, "stream")
        self._readers = ThreadPoolExecutor(_READER_THREADS, "reader")
        self._probes = ThreadPoolExecutor(_PROBE_THREADS, "service")
        self._control = ThreadPoolExecutor(1, "control")
        self._open: set[_Stream] = set()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._handlers = {
            f"/{SERVICE}/{name}": self._unary(name)
            for name, method in METHODS.items()
            if not method.client_streaming and name != "ModelInfer"
        }
        self._handlers[_INFER] = grpc.unary_unary_rpc_method_handler(
            Behavior(self._infer, self._requests)
        )
        self._handlers[_STREAM] = grpc.stream_stream_rpc_method_handler(
            Behavior(self._stream, self._streams, experimental_non_blocking=True)
        )
        for name, instead in _NOT_OFFERED.items():
            error = partial(NotOffered, f"{name} is not offered: {instead}")
            self._handlers[f"/{SERVICE}/{name}"] = self._refusing(error, name)
        self._no_room = self._refusing(
            lambda: Overloaded("the server has no room for another call", retry_after_s())
        )
        self._not_allowed: dict[type[VisibleError], grpc.RpcMethodHandler[Any, Any]] = {
            kind: self._refusing(partial(kind, message))
            for kind, message in ((Unauthenticated, UNKNOWN_CALLER), (Forbidden, NOT_ALLOWED))
        }

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Find what handles a call; called in gRPC's own thread when a call arrives."""
        method = details.method
        if self._access is not None and not self._access.asks_for_certificates:
            error = self._refusal(method, details.invocation_metadata, frozenset())
            if error is not None:
                return self._not_allowed[type(error)]
        if method == _INFER:
            if self._requests.full or self._is_full():
                return self._no_room
        elif method == _STREAM and self._streams.full:
            return self._no_room
        return self._handlers.get(method)

    def close(self) -> None:
        """End every stream, each after what it is working on, so that clients go elsewhere."""
        self._closing.set()
        with self._lock:
            streams = list(self._open)
        for stream in streams:
            stream.end_if_idle()

    def shutdown(self) -> None:
        """Start no more calls."""
        for pool in (
            self._requests,
            self._readers,
            self._streams,
            self._probes,
            self._control,
        ):
            pool.shutdown(wait=False)

    def _unary(self, name: str) -> "grpc.RpcMethodHandler[Any, Any]":
        request_type = GetMessageClass(METHODS[name].input_type)
        response_type = GetMessageClass(METHODS[name].output_type)
        method = getattr(self._service, name)
        counters = self._telemetry.counters

        def behavior(raw: bytes, context: grpc.ServicerContext) -> Message:
            request = None
            try:
                self._admit(name, context)
                request = request_type.FromString(raw)
                response: Message = method(request)
            except Exception as error:
                failure = failure_of(name, request, error)
                counters.count_call(name, failure.code.name, failure.reason)
                failure.end(context)
            counters.count_call(name, "OK")
            return response

        return grpc.unary_unary_rpc_method_handler(
            Behavior(behavior, self._control if name in _CONTROL else self._probes),
            response_serializer=response_type.SerializeToString,
        )

    def _begin(self, raw: bytes, arrival: Arrival) -> None:
        """Take a request in, without holding up gRPC's own thread."""
        record = self._telemetry.begin("ModelInfer", arrival.context)
        if len(raw) < _LARGE_BYTES:
            self._start(raw, arrival, record)
        else:
            self._readers.submit(self._start, raw, arrival, record)

    def _start(self, raw: bytes, arrival: Arrival, record: Record) -> None:
        request = None

        def tell(found: Answer | Exception) -> None:
            try:
                if not isinstance(found, Exception):
                    arrival.answer(_written(found, record))
                    return
            except Exception as error:  # an answer of more than 2 GB
                found = error
            failure = failure_of("ModelInfer", request, found)
            record.failed(failure, request)
            arrival.fail(failure.code, failure.details, failure.trailing)

        try:
            self._admit("ModelInfer", arrival.context)
            request = pb.ModelInferRequest.FromString(raw)
            self._service.start_infer(request, arrival, tell)
        except Exception as error:
            tell(error)

    def _infer(self, raw: bytes, context: grpc.ServicerContext) -> bytes:
        """Answer a request in a thread of its own."""
        record = self._telemetry.begin("ModelInfer", context)
        call = _Threaded(context, Deadline(context))
        request = None
        try:
            self._admit("ModelInfer", context)
            request = pb.ModelInferRequest.FromString(raw)
            return _written(self._service.infer(request, call), record)
        except Exception as error:
            failure = failure_of("ModelInfer", request, error)
            record.failed(failure, request)
            failure.end(context)

    def _stream(
        self,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        send: Callable[[bytes | None], None],
    ) -> None:
        """Answer the requests of a stream one by one; gRPC reads none before it is asked for."""
        try:
            self._admit("ModelStreamInfer", context)
        except VisibleError as error:
            failure = failure_of("ModelStreamInfer", None, error)
            self._telemetry.counters.count_call(
                "ModelStreamInfer", failure.code.name, failure.reason
            )
            failure.end(context)
        strict = _STRICT in {(key, value) for key, value in context.invocation_metadata()}
        stream = _Stream(context, send, Deadline(context))
        with self._lock:
            self._open.add(stream)
        try:
            for raw in requests:
                with stream.busy:
                    if stream.ended:
                        return
                    send(self._stream_response(raw, stream, strict=strict))
                if self._closing.is_set():
                    break
            if self._closing.is_set():
                stream.end_if_idle()
            else:
                send(None)
        finally:
            with self._lock:
                self._open.discard(stream)

    def _stream_response(self, raw: bytes, stream: "_Stream", *, strict: bool) -> bytes:
        record = self._telemetry.begin("ModelStreamInfer", stream.context)
        request = None
        try:
            request = pb.ModelInferRequest.FromString(raw)
            return _written(self._service.infer(request, stream), record, in_stream=True)
        except Exception as error:
            failure = failure_of("ModelStreamInfer", request, error)
            record.failed(failure, request)
            if strict:
                failure.end(stream.context)
            empty = pb.ModelInferResponse(id=request.id if request else "")
            return pb.ModelStreamInferResponse(
                error_message=failure.details, infer_response=empty
            ).SerializeToString()

    def _admit(self, name: str, context: grpc.ServicerContext) -> None:
        """Let a caller in; the door has not seen its certificate.

        Raises:
            Unauthenticated: It has not said who it is, or is not known.
            Forbidden: It may not call this.
        """
        if self._access is None:
            return
        found: Any = context.auth_context()  # lists of bytes by key, whatever its types say
        metadata, names = context.invocation_metadata(), certificate_names(found)
        error = self._refusal(f"/{SERVICE}/{name}", metadata, names)
        if error is not None:
            raise error

    def _refusal(
        self, method: str, metadata: Iterable[tuple[str, Any]], names: Set[str]
    ) -> VisibleError | None:
        """Tell why a caller is not let in; None if it is."""
        group = self._groups.get(method)
        if self._access is None or group is None:
            return None
        sent = [value for key, value in metadata if key == _AUTHORIZATION]
        return self._access.refusal(group, sent[0] if len(sent) == 1 else None, names)

    def _refusing(
        self, error: Callable[[], VisibleError], method: str = "refused"
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """Make a handler that ends every call before its message is read.

        Args:
            error: Makes what it ends with.
            method: As which it is counted.
        """

        def failure() -> Failure:
            found = failure_of(method, None, error())
            self._telemetry.counters.count_call(method, found.code.name, found.reason)
            return found

        def refuse(arrival: Arrival) -> None:
            found = failure()
            arrival.fail(found.code, found.details, found.trailing)

        def abort(requests: Iterator[bytes], context: grpc.ServicerContext) -> NoReturn:
            failure().end(context)

        if arrivals.SUPPORTED:
            return grpc.unary_unary_rpc_method_handler(Behavior(None, Refusals(refuse)))
        # As a stream: before the behavior of a single message gRPC would read the message.
        return grpc.stream_unary_rpc_method_handler(Behavior(abort, Inline()))


def _written(answer: Answer, record: Record, *, in_stream: bool = False) -> bytes:
    """Write an answer, and tell that a request has it."""
    message: Message = answer.response
    if in_stream:
        answer.response.parameters[_FINAL].bool_param = True
        message = pb.ModelStreamInferResponse(infer_response=answer.response)
    content = message.SerializeToString()
    record.answered(answer)
    return content


@dataclass(frozen=True)
class _Threaded:
    """The `Call` of a request that has a thread of its own."""

    context: grpc.ServicerContext
    deadline: Deadline

    def time_remaining(self) -> float | None:
        return self.deadline.remaining()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return self.context.add_callback(callback)


@dataclass(eq=False)
class _Stream:
    """A stream that is open, and the `Call` of each of its requests in turn."""

    context: grpc.ServicerContext
    send: Callable[[bytes | None], None]
    deadline: Deadline
    busy: threading.Lock = field(default_factory=threading.Lock)
    ended: bool = False
    given_up: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        # gRPC keeps every callback until the call ends, and a stream may have millions of requests.
        self.context.add_callback(lambda: self.given_up and self.given_up())

    def time_remaining(self) -> float | None:
        return self.deadline.remaining()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.given_up = callback  # before it is known that the call goes on: one of both tells
        return self.context.is_active()

    def end_if_idle(self) -> None:
        """End it, unless it is working on a request, after which it looks by itself."""
        if self.busy.acquire(blocking=False):
            try:
                if not self.ended:
                    self.ended = True
                    self.context.set_code(grpc.StatusCode.UNAVAILABLE)
                    self.context.set_details("the server is stopping; go on elsewhere")
                    self.send(None)
            finally:
                self.busy.release()
