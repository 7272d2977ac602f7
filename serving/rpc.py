"""gRPC's side of the service: which thread answers what, and errors to status codes.

Requests to run a model have no threads (see arrivals.py), streams have one each. Who comes when
there are too many is refused at the door: in gRPC's own thread, before the message is read. What
must be answered however busy the server is has threads of its own.

This is where errors become gRPC status codes, in one table and one place. What a client is told is
the message of a `VisibleError`; of anything else it learns only that it was not its fault.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from protos import inference_pb2 as pb
from serving import arrivals
from serving.arrivals import Arrival, Arrivals, Refusals
from serving.errors import (
    ControlRefused,
    Expired,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    NotOffered,
    Overloaded,
    VisibleError,
)
from serving.metrics import Counters
from serving.pools import Behavior, CountingPool, Inline
from serving.service import SERVICE, InferenceService

_STATUS: dict[type[VisibleError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotOffered: grpc.StatusCode.UNIMPLEMENTED,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    ModelNotReady: grpc.StatusCode.UNAVAILABLE,
    ControlRefused: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_PUSHBACK = "grpc-retry-pushback-ms"  # when gRPC's own retries are to try again
_LONGEST_PUSHBACK_MS = 60_000
_STRICT = ("triton_grpc_error", "true")  # a stream is to end with a status at the first error
_FINAL = "triton_final_response"  # clients of streams wait for it; there is one answer to a request

_METHODS = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
_INFER, _STREAM = f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ModelStreamInfer"
_CONTROL = ("RepositoryModelLoad", "RepositoryModelUnload")
_NOT_OFFERED = {  # of Triton's methods
    **{
        f"{kind}SharedMemory{verb}": "tensors travel in the messages"
        for kind in ("System", "Cuda")
        for verb in ("Status", "Register", "Unregister")
    },
    "TraceSetting": "nothing is traced",
    "LogSettings": "--log-level is set when the server starts",
}
_PROBE_THREADS = 2
_READER_THREADS = 2
_LARGE_BYTES = 2**17  # of a message that takes a millisecond to read, which is long for one thread

_log = structlog.get_logger()


class RpcHandlers(grpc.GenericRpcHandler):
    """The handlers of every method of the service, for `add_generic_rpc_handlers`.

    Messages are parsed in the handlers, because bytes that are no message are the client's fault
    and gRPC's own parsing would call them ours.

    Args:
        service: What answers.
        counters: Told how every call ended.
        max_requests: Most requests in the server at a time, beside those of streams.
        max_streams: Most streams open at a time.
        is_full: Tells whether requests are to be refused before they are read.
        retry_after_s: Tells when there will be room again, in seconds.
    """

    def __init__(
        self,
        service: InferenceService,
        counters: Counters,
        max_requests: int,
        max_streams: int,
        is_full: Callable[[], bool],
        retry_after_s: Callable[[], float],
    ) -> None:
        self._service = service
        self._counters = counters
        self._is_full = is_full
        self._retry_after_s = retry_after_s
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
            for name, method in _METHODS.items()
            if not method.client_streaming
        }
        self._handlers[_STREAM] = grpc.stream_stream_rpc_method_handler(
            Behavior(self._stream, self._streams, experimental_non_blocking=True),
            response_serializer=pb.ModelStreamInferResponse.SerializeToString,
        )
        self._refusal = _refusing(self._no_room)
        for name in _NOT_OFFERED:
            self._handlers[f"/{SERVICE}/{name}"] = _refusing(partial(self._not_offered, name))

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Find what handles a call; called in gRPC's own thread when a call arrives."""
        method = details.method
        if method == _INFER:
            if self._requests.full or self._is_full():
                return self._refusal
        elif method == _STREAM and self._streams.full:
            return self._refusal
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
        request_type = GetMessageClass(_METHODS[name].input_type)
        response_type = GetMessageClass(_METHODS[name].output_type)
        method = getattr(self._service, name)
        with_call = name == "ModelInfer"

        def behavior(raw: bytes, context: grpc.ServicerContext) -> Message:
            request = None
            try:
                request = request_type.FromString(raw)
                response: Message = method(request, context) if with_call else method(request)
            except Exception as error:
                self._failure(name, request, error).end(context)
            self._counters.count_call(name, "OK")
            return response

        pool = self._requests if with_call else self._probes
        return grpc.unary_unary_rpc_method_handler(
            Behavior(behavior, self._control if name in _CONTROL else pool),
            response_serializer=response_type.SerializeToString,
        )

    def _begin(self, raw: bytes, arrival: Arrival) -> None:
        """Take a request in, without holding up gRPC's own thread."""
        if len(raw) < _LARGE_BYTES:
            self._start(raw, arrival)
        else:
            self._readers.submit(self._start, raw, arrival)

    def _start(self, raw: bytes, arrival: Arrival) -> None:
        request = None

        def tell(found: pb.ModelInferResponse | Exception) -> None:
            try:
                if not isinstance(found, Exception):
                    content = found.SerializeToString()
                    self._counters.count_call("ModelInfer", "OK")
                    arrival.answer(content)
                    return
            except Exception as error:  # an answer of more than 2 GB
                found = error
            failure = self._failure("ModelInfer", request, found)
            arrival.fail(failure.code, failure.details, failure.trailing)

        try:
            request = pb.ModelInferRequest.FromString(raw)
            self._service.start_infer(request, arrival, tell)
        except Exception as error:
            tell(error)

    def _stream(
        self,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        send: Callable[[Message | None], None],
    ) -> None:
        """Answer the requests of a stream one by one; gRPC reads none before it is asked for."""
        strict = _STRICT in {(key, value) for key, value in context.invocation_metadata()}
        stream = _Stream(context, send)
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

    def _stream_response(
        self, raw: bytes, stream: "_Stream", *, strict: bool
    ) -> pb.ModelStreamInferResponse:
        request = None
        try:
            request = pb.ModelInferRequest.FromString(raw)
            answer = self._service.ModelInfer(request, stream)
        except Exception as error:
            failure = self._failure("ModelStreamInfer", request, error)
            if strict:
                failure.end(stream.context)
            answer = pb.ModelInferResponse(id=request.id if request else "")
            return pb.ModelStreamInferResponse(error_message=failure.details, infer_response=answer)
        self._counters.count_call("ModelStreamInfer", "OK")
        answer.parameters[_FINAL].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=answer)

    def _no_room(self) -> "_Failure":
        error = Overloaded("the server has no room for another call", self._retry_after_s())
        return self._failure("refused", None, error)

    def _not_offered(self, method: str) -> "_Failure":
        error = NotOffered(f"{method} is not offered: {_NOT_OFFERED[method]}")
        return self._failure(method, None, error)

    def _failure(self, method: str, request: Any, error: Exception) -> "_Failure":
        """Find the status of an error, log what the client is not told, and count it."""
        retry_after_s = None
        if isinstance(error, DecodeError):
            code = grpc.StatusCode.INVALID_ARGUMENT
            expected = _METHODS[method].input_type.full_name
            details = f"expected {expected}, found no such message"
        elif isinstance(error, VisibleError):
            code, details = _STATUS[type(error)], str(error)
            if isinstance(error, Overloaded):
                retry_after_s = error.retry_after_s
        else:
            _log.error("request_failed", method=method, **_identity(request), exc_info=error)
            code, details = grpc.StatusCode.INTERNAL, "internal error; the server's log says more"
        self._counters.count_call(method, code.name)
        return _Failure(code, details, retry_after_s)


@dataclass(frozen=True)
class _Failure:
    """How a call ends that has no answer."""

    code: grpc.StatusCode
    details: str
    retry_after_s: float | None

    @property
    def trailing(self) -> tuple[tuple[str, str], ...]:
        """Metadata to go with it."""
        if self.retry_after_s is None:
            return ()
        pushback = min(max(1, round(self.retry_after_s * 1000)), _LONGEST_PUSHBACK_MS)
        return ((_PUSHBACK, str(pushback)),)

    def end(self, context: grpc.ServicerContext) -> NoReturn:
        context.set_trailing_metadata(self.trailing)
        context.abort(self.code, self.details)
        raise AssertionError("abort returned")  # it never does


def _refusing(failure: Callable[[], _Failure]) -> "grpc.RpcMethodHandler[Any, Any]":
    """Make a handler that ends every call before its message is read."""

    def refuse(arrival: Arrival) -> None:
        found = failure()
        arrival.fail(found.code, found.details, found.trailing)

    def abort(requests: Iterator[bytes], context: grpc.ServicerContext) -> NoReturn:
        failure().end(context)

    if arrivals.SUPPORTED:
        return grpc.unary_unary_rpc_method_handler(Behavior(None, Refusals(refuse)))
    # As a stream: before the behavior of a single message gRPC would read the message.
    return grpc.stream_unary_rpc_method_handler(Behavior(abort, Inline()))


@dataclass(eq=False)
class _Stream:
    """A stream that is open, and the `Call` of each of its requests in turn."""

    context: grpc.ServicerContext
    send: Callable[[Message | None], None]
    busy: threading.Lock = field(default_factory=threading.Lock)
    ended: bool = False
    given_up: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        # gRPC keeps every callback until the call ends, and a stream may have millions of requests.
        self.context.add_callback(lambda: self.given_up and self.given_up())

    def time_remaining(self) -> float | None:
        return self.context.time_remaining()

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


def _identity(request: Any) -> dict[str, str]:
    """Say which request it was, for the log."""
    if not isinstance(request, pb.ModelInferRequest):
        return {}
    return {"model": request.model_name, "version": request.model_version, "id": request.id[:128]}
