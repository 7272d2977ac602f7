"""Calls of one message without a thread each.

grpcio gives every call a thread, in which it waits for the message, then for its turn, and then for
the answer; on one CPU that costs more than a small model. What grpcio hands to its threads is taken
in here instead: the message is asked for, and when it is there, gRPC's own thread hands it on and
goes back to work. Whoever has the answer sends it. `python -m benchmarks.serving` measures it.

This is the one place that uses private names, those of `grpc._server`. `SUPPORTED` tells whether
they are as in the versions that this was tried with, 1.81 to 1.85; if not, calls have threads.
"""

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import structlog
from grpc import _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from serving.deadline import Deadline

_log = structlog.get_logger()


def _is_supported() -> bool:
    """Compare what is used with what it was written for."""
    wanted = {
        "_receive_message": ["state", "call", "request_deserializer"],
        "_status": ["rpc_event", "state", "serialized_response"],
        "_unary_response_in_pool": [
            "rpc_event",
            "state",
            "behavior",
            "argument_thunk",
            "request_deserializer",
            "response_serializer",
        ],
        "_Context": ["rpc_event", "state", "request_deserializer"],
    }
    constants = ("_RECEIVE_MESSAGE_TOKEN", "_EMPTY_FLAGS", "_CLOSED")
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
        rpc_event: grpcio's, as what follows; of them the context is for handlers.
        state: Of the call.
        request_deserializer: Of the handler.
        present: Where it is to be found until it ends.

    Attributes:
        context: What grpcio gives to handlers.
    """

    __slots__ = ("_deadline", "_on_end", "_present", "_rpc_event", "_state", "context")

    def __init__(
        self, rpc_event: Any, state: Any, request_deserializer: Any, present: "set[Arrival]"
    ) -> None:
        self.context = _server._Context(rpc_event, state, request_deserializer)
        self._deadline = Deadline(self.context)
        self._rpc_event = rpc_event
        self._state = state
        self._on_end: Callable[[Arrival], Any] | None = None
        self._present = present

    def add_done_callback(self, callback: "Callable[[Arrival], Any]") -> None:
        """Have something called when the answer is sent, which is all that grpcio asks of a future.

        It asks before the message can be there, and so before the end.
        """
        self._on_end = callback

    def time_remaining(self) -> float | None:
        """Tell for how many seconds the answer is wanted."""
        return self._deadline.remaining()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have something called when the call has ended; tell whether it has not yet."""
        return self.context.add_callback(callback)

    def answer(self, content: bytes) -> None:
        """Send the answer; it has no effect if the caller has gone."""
        self._end(content)

    def fail(
        self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """End without an answer."""
        self.context.set_code(code)
        self.context.set_details(details)
        self.context.set_trailing_metadata(trailing)
        self._end(None)

    def leave(self) -> None:
        """End with nothing to be sent."""
        self._present.discard(self)
        if self._on_end is not None:
            self._on_end(self)

    def _end(self, content: bytes | None) -> None:
        try:
            _server._status(self._rpc_event, self._state, content)
        except Exception as error:  # whoever answers goes on
            _log.error("not_sent", exc_info=error)
        self.leave()


class Refusals(ThreadPoolExecutor):
    """What ends calls as soon as they come, before their messages are read.

    Args:
        refuse: Ends a call; called in gRPC's own thread.
    """

    def __init__(self, refuse: Callable[[Arrival], None]) -> None:
        super().__init__(1)  # which starts no thread
        self._refuse = refuse

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """End a call, in place of running `_unary_response_in_pool`."""
        _, rpc_event, state, _, _, request_deserializer, _ = args
        self._refuse(Arrival(rpc_event, state, request_deserializer, set()))
        return None  # as grpcio does for calls that it refuses itself


class Arrivals(ThreadPoolExecutor):
    """What grpcio is given in place of threads for a method of one message and one answer.

    Args:
        begin: Takes a message in and sees to its answer; called in gRPC's own thread, so it must
            not wait.
        most: Calls in the server at a time, beyond which `full` is true.
    """

    def __init__(self, begin: Callable[[bytes, Arrival], None], most: int) -> None:
        super().__init__(1)  # which starts no thread
        self._begin = begin
        self._most = most
        self._present: set[Arrival] = set()  # needs no lock to add to or take from

    @property
    def full(self) -> bool:
        """Whether another call is one too many."""
        return len(self._present) >= self._most

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Ask for the message of a call, in place of running `_unary_response_in_pool`."""
        _, rpc_event, state, _, _, request_deserializer, _ = args
        arrival = Arrival(rpc_event, state, request_deserializer, self._present)
        take = _server._receive_message(state, rpc_event.call, request_deserializer)

        def received(event: Any) -> Any:
            after = take(event)
            with state.condition:
                message, state.request = state.request, None
                is_missing = message is None and state.client is _server._CLOSED
            if message is not None:
                self._try_to_begin(message, arrival)
            elif is_missing:
                arrival.fail(grpc.StatusCode.UNIMPLEMENTED, "expected one message, found none")
            else:  # it has ended, and nothing can be sent
                arrival.leave()
            return after

        with state.condition:
            rpc_event.call.start_server_batch(
                (cygrpc.ReceiveMessageOperation(_server._EMPTY_FLAGS),), received
            )
            state.due.add(_server._RECEIVE_MESSAGE_TOKEN)
            self._present.add(arrival)
        return arrival

    def _try_to_begin(self, message: bytes, arrival: Arrival) -> None:
        """Begin; an error here would be the end of gRPC's thread, and so of the server."""
        try:
            self._begin(message, arrival)
        except Exception as error:
            _log.error("request_failed", exc_info=error)
            arrival.fail(grpc.StatusCode.INTERNAL, "internal error; the server's log says more")
