"""Calls of one message, which are let in before their message is read and wait without a thread.

grpcio gives every call a thread, in which it waits for the message, then for its turn, and then for
the answer; on one CPU that costs more than a small model, and a few callers that send no message
hold every thread. What grpcio hands to its threads is taken in here instead: the caller is let in
or refused, the message is asked for, and when it is there, gRPC's own thread hands it on and goes
back to work. Whoever has the answer sends it. `python -m benchmarks.serving` measures it.

This is the one place that uses private names, those of `grpc._server`. `SUPPORTED` tells whether
they are as in the versions that this was tried with, 1.81 to 1.85; if not, calls have threads.
"""

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import structlog
from grpc import _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from serving.budget import ANSWER_COPIES
from serving.deadline import Deadline
from serving.failures import INTERNAL, NO_MESSAGE, Failure
from serving.gate import Gate

_log = structlog.get_logger()


def _is_supported() -> bool:
    """Compare what is used with what it was written for."""
    in_pool = [
        *("rpc_event", "state", "behavior", "argument_thunk"),
        *("request_deserializer", "response_serializer"),
    ]
    wanted = {
        "_receive_message": ["state", "call", "request_deserializer"],
        "_status": ["rpc_event", "state", "serialized_response"],
        "_unary_response_in_pool": in_pool,
        "_stream_response_in_pool": in_pool,
        "_Context": ["rpc_event", "state", "request_deserializer"],
        "_RequestIterator": ["state", "call", "request_deserializer"],
    }
    constants = ("_RECEIVE_MESSAGE_TOKEN", "_EMPTY_FLAGS", "_CLOSED", "_CANCELLED")
    try:
        return all(hasattr(_server, name) for name in constants) and all(
            list(inspect.signature(getattr(_server, name)).parameters) == parameters
            for name, parameters in wanted.items()
        )
    except AttributeError:
        return False


SUPPORTED = _is_supported()
"""Whether this grpcio is one that `Arrivals` can be used with."""


class Arrival:
    """A call. Ends once, with an answer or a status.

    Args:
        gate: What it came in by.
        work: What grpcio gave to a thread: a function and its arguments.

    Attributes:
        context: What grpcio gives to handlers.
        lacks_message: Whether it has ended its side, or was cancelled, without a message.
    """

    __slots__ = (
        *("_connection", "_deadline", "_ended", "_gate", "_on_end", "_work"),
        *("context", "lacks_message"),
    )

    def __init__(self, gate: Gate, work: tuple[Any, ...]) -> None:
        self._gate = gate
        self._work = work
        _, _, rpc_event, state, _, _, request_deserializer, _ = work
        self.context = _server._Context(rpc_event, state, request_deserializer)
        self._deadline = Deadline(self.context)
        self._connection: str | None = None
        self._ended = False
        self.lacks_message = False
        self._on_end: list[Callable[[Arrival], Any]] = []  # one, that one thread takes

    @property
    def connection(self) -> str:
        """Its connection, which gRPC is asked for when it matters."""
        if self._connection is None:
            self._connection = self.context.peer()
        return self._connection

    def add_done_callback(self, callback: "Callable[[Arrival], Any]") -> None:
        """Have something called at the end, which is all that grpcio asks of a future."""
        self._on_end.append(callback)
        if self._ended:
            self.leave()

    def time_remaining(self) -> float | None:
        """Tell for how many seconds the answer is wanted."""
        return self._deadline.remaining()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have something called when the call has ended; tell whether it has not yet."""
        return self.context.add_callback(callback)

    def hold(self, size: int) -> bool:
        """Count more bytes of its message; tell whether the budget has room for them."""
        return self._gate.room.hold(self, size)

    def answer(self, content: bytes) -> None:
        """Send the answer; it has no effect if the caller has gone."""
        self._end(content)

    def fail(self, failure: Failure) -> None:
        """End without an answer."""
        self.context.set_code(failure.code)
        self.context.set_details(failure.details)
        self.context.set_trailing_metadata(failure.trailing)
        self._end(None)

    def give_up(self, *, late: bool) -> None:
        """End, because no message has come, or because its answer is not taken."""
        if self._ended:
            self.context.cancel()
        else:
            self.fail(self._gate.silent(late=late))

    def run(self, message: bytes) -> None:
        """Do what grpcio would have done in a thread, in this one, with the message that came."""
        run, target, rpc_event, state, behavior, _, *serializers = self._work
        try:
            run(target, rpc_event, state, behavior, lambda: message, *serializers)
        finally:
            if target is _server._stream_response_in_pool:  # lasts as long as its client likes
                self._gate.room.leave(self)
            self.leave()

    def leave(self) -> None:
        """End with nothing more to be sent. It has no effect the second time."""
        self._leave(0)

    def close(self) -> None:
        """Note that gRPC has ended it as well: its client has all of it, or has gone."""
        self._gate.room.leave(self)
        if self.lacks_message:
            state = self._work[3]
            self._gate.no_message(cancelled=state.client is _server._CANCELLED)

    def _leave(self, size: int) -> None:
        self._ended = True
        self._gate.room.answer(self, size)
        with suppress(IndexError):
            self._on_end.pop()(self)

    def _end(self, content: bytes | None) -> None:
        _, _, rpc_event, state, *_ = self._work
        try:
            _server._status(rpc_event, state, content)
        except Exception as error:  # whoever answers goes on
            _log.error("not_sent", exc_info=error)
        self._leave(ANSWER_COPIES * len(content or b""))


class Messages(_server._RequestIterator):
    """The messages of a stream, which end as gRPC's own do when one is too large.

    Args:
        messages: gRPC's own.

    Attributes:
        is_too_large: Whether the last one was.
    """

    def __init__(self, messages: Any) -> None:
        super().__init__(messages._state, messages._call, messages._request_deserializer)
        self.is_too_large = False

    def _raise_or_start_receive_message(self) -> None:
        state: Any = self._state
        if state.client is _server._CANCELLED or state.statused:
            super()._raise_or_start_receive_message()  # which raises
            return
        take = _server._receive_message(state, self._call, self._request_deserializer)

        def received(event: Any) -> Any:
            self.is_too_large = not event.success
            return take(event)

        self._call.start_server_batch(
            (cygrpc.ReceiveMessageOperation(_server._EMPTY_FLAGS),), received
        )
        state.due.add(_server._RECEIVE_MESSAGE_TOKEN)


def is_too_large(messages: object) -> bool:
    """Tell whether messages of a stream have ended because one was too large."""
    return isinstance(messages, Messages) and messages.is_too_large


class Arrivals(ThreadPoolExecutor):
    """What grpcio is given in place of threads for a method of one message.

    Args:
        gate: Lets calls in, before their message is read.
        begin: Takes a message in and sees to its answer; called in gRPC's own thread, so it must
            not wait.
    """

    def __init__(self, gate: Gate, begin: Callable[[bytes, Arrival], None]) -> None:
        super().__init__(1)  # which starts no thread
        self._gate = gate
        self._begin = begin

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Ask for the message of a call, in place of running grpcio's function."""
        arrival = Arrival(self._gate, (fn, *args))
        refusal = self._gate.refusal(arrival.context)
        if refusal is None and not self._gate.room.enter(arrival):
            refusal = self._gate.full()
        if refusal is not None:
            arrival.fail(refusal)
            return None  # as grpcio does for calls that it refuses itself
        arrival.add_callback(arrival.close)
        _, rpc_event, state, _, _, request_deserializer, _ = args
        take = _server._receive_message(state, rpc_event.call, request_deserializer)

        def received(event: Any) -> Any:
            after = take(event)
            with state.condition:
                message, state.request = state.request, None
                is_closed = state.client is _server._CLOSED
            if not self._gate.room.hear(arrival, len(message or b"")):  # it was given up
                return after
            if message is not None:
                refusal = self._gate.hold(arrival, message)
                if refusal is None:
                    self._try_to_begin(message, arrival)
                else:
                    arrival.fail(refusal)
            elif not event.success:  # gRPC ends it, because its message is too large
                self._gate.too_large()
                arrival.leave()
            else:  # which of both it was, is known when gRPC has ended it
                arrival.lacks_message = True
                if is_closed:
                    arrival.fail(NO_MESSAGE)
                else:
                    arrival.leave()
            return after

        with state.condition:
            rpc_event.call.start_server_batch(
                (cygrpc.ReceiveMessageOperation(_server._EMPTY_FLAGS),), received
            )
            state.due.add(_server._RECEIVE_MESSAGE_TOKEN)
        return arrival

    def _try_to_begin(self, message: bytes, arrival: Arrival) -> None:
        """Begin; an error here would be the end of gRPC's thread, and so of the server."""
        try:
            self._begin(message, arrival)
        except Exception as error:
            _log.error("request_failed", exc_info=error)
            arrival.fail(INTERNAL)
