"""gRPC's side of the service: which thread answers what, and who gets no answer.

Requests to run a model have no threads, streams have one each. Who comes when there are too many,
or may not come, is refused at the door, before the message is read (see transport/). What must be
answered however busy the server is has threads of its own.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from serving.access import Group
from serving.budget import Budget
from serving.callers import Caller, Callers
from serving.errors import Cancelled, NotOffered, Overloaded
from serving.failures import failure_of
from serving.gate import Gate
from serving.infer_request import InferRequest
from serving.messages import PROBE_BYTES, SMALL_BYTES, is_compressed, parse
from serving.observability.metrics import Counters
from serving.observability.telemetry import Record, Telemetry
from serving.requests import METHOD, METHOD_STREAM, Requests
from serving.room import Room
from serving.service import METHODS, SERVICE, Answer, InferenceService
from serving.streams import Streams
from serving.transport.unary import UnaryCall, UnaryMethod

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
    """The handlers of every method of the service; gRPC is given this for those of streams.

    Messages are parsed in the handlers, because bytes that are no message are the client's fault
    and gRPC's own parsing would call them ours.

    Args:
        service: What answers.
        telemetry: Told how every call ended.
        callers: Who may call what.
        probes: Room for calls that are open to everybody.
        limits: How much callers may ask for.
        budget: Counts the bytes of requests and answers.
        is_full: Tells whether requests are to be refused before they are read.
        retry_after_s: Tells when there will be room again, in seconds.

    Attributes:
        rooms: Where calls are, by what they are for.
        methods: What handles calls of one message, by the path of the method.
    """

    def __init__(
        self,
        service: InferenceService,
        telemetry: Telemetry,
        callers: Callers,
        probes: Room,
        limits: Limits,
        budget: Budget,
        is_full: Callable[[], bool],
        retry_after_s: Callable[[], float],
    ) -> None:
        self._service = service
        self._telemetry = telemetry
        self._callers = callers
        self._is_full = is_full
        self._requests = Requests(
            service, telemetry, budget, limits.max_message_bytes, retry_after_s
        )
        self._streams = Streams(self._requests, callers, limits.max_streams, limits.peer_share)
        patience_s = probes.patience_s
        room = Room(limits.max_requests, patience_s, budget=budget)
        self._calls = Room(_SERVICE_CALLS, patience_s, limits.most_silent, budget)
        self._controls = Room(_CONTROL_CALLS, patience_s, limits.most_silent, budget)
        self.rooms: Mapping[str, Room] = {
            "requests": room,
            "calls": self._calls,
            "control": self._controls,
            "probes": probes,
            "streams": self._streams.room,
        }
        self._readers = ThreadPoolExecutor(_READER_THREADS, "reader")
        self._threads = ThreadPoolExecutor(_SERVICE_THREADS, "service")
        self._control = ThreadPoolExecutor(1, "control")
        methods = {
            name: self._unary(name, probes)
            for name in METHODS
            if name not in (METHOD, METHOD_STREAM)
        }
        methods[METHOD] = UnaryMethod(
            self._gate(METHOD, room, self._require_room, limits.max_message_bytes),
            self._begin,
        )
        for name, instead in _NOT_OFFERED.items():
            methods[name] = self._refusing(name, f"{name} is not offered: {instead}")
        self.methods = {f"/{SERVICE}/{name}": method for name, method in methods.items()}

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Find what handles a stream; called in gRPC's own thread when one arrives."""
        return self._streams.handler if details.method == f"/{SERVICE}/{METHOD_STREAM}" else None

    def close(self) -> None:
        """End every stream, each after what it is working on, so that clients go elsewhere."""
        self._streams.close()

    def shutdown(self) -> None:
        """Start no more calls."""
        self._streams.shutdown()
        for pool in (self._readers, self._threads, self._control):
            pool.shutdown(wait=False)

    def _unary(self, name: str, probes: Room) -> UnaryMethod:
        request_type = GetMessageClass(METHODS[name].input_type)
        method = getattr(self._service, name)
        counters = self._telemetry.counters

        def answer(raw: bytes, call: UnaryCall) -> None:
            request = None
            try:
                request = parse(request_type, raw, PROBE_BYTES if name in _OPEN else SMALL_BYTES)
                response: Message = method(request)
                content = response.SerializeToString()
            except Exception as error:
                failure = failure_of(name, request, error)
                counters.count_call(name, failure.code.name, failure.reason)
                call.fail(failure)
            else:
                counters.count_call(name, "OK")
                call.answer(content)

        if name in _OPEN:
            return UnaryMethod(self._gate(name, probes), answer)
        if name in _CONTROL:
            room, pool = self._controls, self._control
        else:
            room, pool = self._calls, self._threads

        def begin(raw: bytes, call: UnaryCall) -> None:
            pool.submit(answer, raw, call)

        return UnaryMethod(self._gate(name, room), begin)

    def _gate(
        self,
        name: str,
        room: Room,
        require: Callable[[], None] = lambda: None,
        max_message_bytes: int = SMALL_BYTES,
    ) -> Gate:
        """Make the way in to a method."""
        group = _group_of(name)

        def admit(caller: Caller) -> None:
            self._callers.admit(group, caller)
            require()

        return Gate(
            *(room, admit, partial(self._requests.refused, name)),
            *(self._requests.retry_after_s, max_message_bytes),
            always=name != METHOD,  # small messages, of few calls
        )

    def _require_room(self) -> None:
        """Raise where requests have no room before they are read."""
        if self._is_full():
            retry_after_s = self._requests.retry_after_s()
            raise Overloaded("the server has no room for another call", retry_after_s)
        self._requests.require_budget()

    def _begin(self, raw: bytes, call: UnaryCall) -> None:
        """Take a request in, without holding up the thread that reads all calls."""
        record = self._telemetry.begin(METHOD, call)
        if not is_compressed(raw) and (len(raw) < _LARGE_BYTES or self._service.is_quick(raw)):
            self._start(lambda: InferRequest(raw), call, record, by_caller=call.runs_short)
            return
        message = [raw]
        call.add_callback(message.clear)  # what is no longer counted waits for no thread
        read = partial(self._read, message, call)
        self._readers.submit(self._start, read, call, record)

    def _read(self, message: list[bytes], call: UnaryCall) -> InferRequest:
        """Read a message that waited, unless its call has ended meanwhile."""
        try:
            raw = message.pop()
        except IndexError:
            raise Cancelled("cancelled") from None
        return self._requests.parse(raw, call.hold)

    def _start(
        self,
        read: Callable[[], InferRequest],
        call: UnaryCall,
        record: Record,
        *,
        by_caller: bool = False,
    ) -> None:
        request = None

        def tell(found: Answer | Exception) -> None:
            if not isinstance(found, Exception):
                record.answered(found)
                call.answer(found.content)
                return
            failure = failure_of(METHOD, request, found)
            record.failed(failure, request)
            call.fail(failure)

        try:
            request = read()
            self._service.start_infer(request, call, tell, by_caller=by_caller)
        except Exception as error:
            tell(error)

    def _refusing(self, name: str, message: str) -> UnaryMethod:
        """Make a method that ends every call before its message is read."""

        def refuse() -> None:
            raise NotOffered(message)

        def never(raw: bytes, call: UnaryCall) -> None:
            raise AssertionError("a call was let in that never is")

        return UnaryMethod(self._gate(name, self._calls, refuse), never)


class Unknown(grpc.GenericRpcHandler):
    """Counts calls of methods that no handler before it has; gRPC answers them.

    Args:
        counters: Count them, without their names, of which there is no end.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def service(self, details: grpc.HandlerCallDetails) -> None:
        """Find nothing."""
        code = grpc.StatusCode.UNIMPLEMENTED.name
        self._counters.count_call("unknown", code, "unknown_method")


def _group_of(name: str) -> Group | None:
    """Find the group of a method; None if everybody may call it."""
    if name in _OPEN or name in _NOT_OFFERED:
        return None
    return "admin" if name in _CONTROL else "inference"
