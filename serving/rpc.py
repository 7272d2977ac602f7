"""gRPC's side of the service: which thread answers what, and who gets no answer.

Requests to run a model have no threads (see arrivals.py), streams have one each. Who comes when
there are too many, or may not come, is refused at the door: in gRPC's own thread, before the
message is read. What must be answered however busy the server is has threads of its own.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from protos import inference_pb2 as pb
from serving.access import Group
from serving.arrivals import Arrival
from serving.callers import Callers, address_of
from serving.deadline import Deadline
from serving.errors import NotOffered, Overloaded, VisibleError
from serving.failures import Failure, failure_of
from serving.gate import Gate
from serving.messages import PROBE_BYTES, SMALL_BYTES, is_compressed, parse
from serving.observability.telemetry import Record, Telemetry
from serving.pools import Behavior, one_message
from serving.room import Places, Room
from serving.service import METHODS, SERVICE, Answer, InferenceService

_FINAL = "triton_final_response"  # clients of streams wait for it; there is one answer to a request
_STRICT = ("triton_grpc_error", "true")  # a stream is to end with a status at the first error

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
_SERVICE_THREADS = 2
_READER_THREADS = 2
_SERVICE_CALLS = 256  # that read about models, at a time
_CONTROL_CALLS = 64
_TO_REFUSE = 8  # threads beside those that streams hold
_LARGE_BYTES = 2**17  # of a message that takes a millisecond to read, which is long for one thread


@dataclass(frozen=True)
class Limits:
    """How much callers may ask for.

    Args:
        max_requests: Requests in the server at a time, beside those of streams.
        max_streams: Streams open at a time.
        max_message_bytes: Largest message, once it is inflated.
        most_silent: Calls without tensors at a time whose message is not there.
        peer_share: Part of what is limited that one address may have, while it is not known whose.
    """

    max_requests: int
    max_streams: int
    max_message_bytes: int
    peer_share: float
    most_silent: int


class RpcHandlers(grpc.GenericRpcHandler):
    """The handlers of every method of the service, for `add_generic_rpc_handlers`.

    Messages are parsed in the handlers, because bytes that are no message are the client's fault
    and gRPC's own parsing would call them ours.

    Args:
        service: What answers.
        telemetry: Told how every call ended.
        callers: Who may call what.
        probes: Room for calls that are open to everybody.
        limits: How much callers may ask for.
        is_full: Tells whether requests are to be refused before they are read.
        retry_after_s: Tells when there will be room again, in seconds.

    Attributes:
        rooms: Where calls of one message are, by what they are for.
    """

    def __init__(
        self,
        service: InferenceService,
        telemetry: Telemetry,
        callers: Callers,
        probes: Room,
        limits: Limits,
        is_full: Callable[[], bool],
        retry_after_s: Callable[[], float],
    ) -> None:
        self._service = service
        self._telemetry = telemetry
        self._callers = callers
        self._limits = limits
        self._is_full = is_full
        self._retry_after_s = retry_after_s
        patience_s = probes.patience_s
        self._requests = Room(limits.max_requests, patience_s)
        self._calls = Room(_SERVICE_CALLS, patience_s, limits.most_silent)
        self._controls = Room(_CONTROL_CALLS, patience_s, limits.most_silent)
        self.rooms: Mapping[str, Room] = {
            "requests": self._requests,
            "calls": self._calls,
            "control": self._controls,
            "probes": probes,
        }
        self._places = Places(limits.max_streams, limits.peer_share)
        self._streams = ThreadPoolExecutor(limits.max_streams + _TO_REFUSE, "stream")
        self._readers = ThreadPoolExecutor(_READER_THREADS, "reader")
        self._threads = ThreadPoolExecutor(_SERVICE_THREADS, "service")
        self._control = ThreadPoolExecutor(1, "control")
        self._open: set[_Stream] = set()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        handlers = {
            name: self._unary(name, probes)
            for name, method in METHODS.items()
            if not method.client_streaming and name != "ModelInfer"
        }
        handlers["ModelInfer"] = one_message(
            self._gate("ModelInfer", self._requests, self._require_room),
            self._infer,
            begin=self._begin,
        )
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            Behavior(self._stream, self._streams, experimental_non_blocking=True)
        )
        for name, instead in _NOT_OFFERED.items():
            handlers[name] = self._refusing(name, f"{name} is not offered: {instead}")
        self._handlers = {f"/{SERVICE}/{name}": handler for name, handler in handlers.items()}

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Find what handles a call; called in gRPC's own thread when a call arrives."""
        return self._handlers.get(details.method)

    def close(self) -> None:
        """End every stream, each after what it is working on, so that clients go elsewhere."""
        self._closing.set()
        with self._lock:
            streams = list(self._open)
        for stream in streams:
            stream.end_if_idle()

    def shutdown(self) -> None:
        """Start no more calls."""
        for pool in (self._readers, self._streams, self._threads, self._control):
            pool.shutdown(wait=False)

    def _unary(self, name: str, probes: Room) -> "grpc.RpcMethodHandler[Any, Any]":
        request_type = GetMessageClass(METHODS[name].input_type)
        response_type = GetMessageClass(METHODS[name].output_type)
        method = getattr(self._service, name)
        counters = self._telemetry.counters

        def behavior(raw: bytes, context: grpc.ServicerContext) -> Message:
            request = None
            try:
                request = parse(request_type, raw, PROBE_BYTES if name in _OPEN else SMALL_BYTES)
                response: Message = method(request)
            except Exception as error:
                failure = failure_of(name, request, error)
                counters.count_call(name, failure.code.name, failure.reason)
                failure.end(context)
            counters.count_call(name, "OK")
            return response

        if name in _OPEN:
            room, pool = probes, None
        elif name in _CONTROL:
            room, pool = self._controls, self._control
        else:
            room, pool = self._calls, self._threads
        return one_message(
            self._gate(name, room),
            behavior,
            pool,
            response_serializer=response_type.SerializeToString,
        )

    def _gate(self, name: str, room: Room, require: Callable[[], None] = lambda: None) -> Gate:
        """Make the way in to a method."""
        group = _group_of(name)

        def admit(context: grpc.ServicerContext) -> None:
            self._callers.admit(group, context)
            require()

        return Gate(room, admit, partial(self._refused, name), self._retry_after_s)

    def _require_room(self) -> None:
        """Raise where requests have no room before they are read."""
        if self._is_full():
            raise Overloaded("the server has no room for another call", self._retry_after_s())

    def _refused(self, name: str, error: Exception) -> Failure:
        """Count a call that is not let in, and find how it ends."""
        failure = failure_of(name, None, error)
        self._telemetry.counters.count_call(name, failure.code.name, failure.reason)
        return failure

    def _begin(self, raw: bytes, arrival: Arrival) -> None:
        """Take a request in, without holding up gRPC's own thread."""
        record = self._telemetry.begin("ModelInfer", arrival.context)
        if len(raw) < _LARGE_BYTES and not is_compressed(raw):
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
            arrival.fail(failure)

        try:
            request = parse(pb.ModelInferRequest, raw, self._limits.max_message_bytes)
            self._service.start_infer(request, arrival, tell)
        except Exception as error:
            tell(error)

    def _infer(self, raw: bytes, context: grpc.ServicerContext) -> bytes:
        """Answer a request in a thread of its own."""
        record = self._telemetry.begin("ModelInfer", context)
        call = _Threaded(context, Deadline(context))
        request = None
        try:
            request = parse(pb.ModelInferRequest, raw, self._limits.max_message_bytes)
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
        peer = address_of(context)
        try:
            self._callers.admit("inference", context)
            if not self._places.take(peer, known=self._callers.knows(context)):
                raise Overloaded("the server has no room for another stream", self._retry_after_s())
        except VisibleError as error:
            self._refused("ModelStreamInfer", error).end(context)
        try:
            self._answer_stream(requests, _Stream(context, send, Deadline(context)))
        finally:
            self._places.give_back(peer)

    def _answer_stream(self, requests: Iterator[bytes], stream: "_Stream") -> None:
        strict = _STRICT in {(key, value) for key, value in stream.context.invocation_metadata()}
        with self._lock:
            self._open.add(stream)
        try:
            for raw in requests:
                with stream.busy:
                    if stream.ended:
                        return
                    stream.send(self._stream_response(raw, stream, strict=strict))
                if self._closing.is_set():
                    break
            if self._closing.is_set():
                stream.end_if_idle()
            else:
                stream.send(None)
        finally:
            with self._lock:
                self._open.discard(stream)

    def _stream_response(self, raw: bytes, stream: "_Stream", *, strict: bool) -> bytes:
        record = self._telemetry.begin("ModelStreamInfer", stream.context)
        request = None
        try:
            request = parse(pb.ModelInferRequest, raw, self._limits.max_message_bytes)
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

    def _refusing(self, name: str, message: str) -> "grpc.RpcMethodHandler[Any, Any]":
        """Make a handler that ends every call before its message is read."""

        def refuse() -> None:
            raise NotOffered(message)

        def never(raw: bytes, context: grpc.ServicerContext) -> bytes:
            raise AssertionError("a call was let in that never is")

        return one_message(self._gate(name, self._calls, refuse), never)


def _group_of(name: str) -> Group | None:
    """Find the group of a method; None if everybody may call it."""
    if name in _OPEN or name in _NOT_OFFERED:
        return None
    return "admin" if name in _CONTROL else "inference"


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
