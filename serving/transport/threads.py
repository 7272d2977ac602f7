"""Calls of one message by threads, which is the public way of grpc.server.

Each call has a thread from when it comes until it is answered. gRPC would read the message before
it calls a handler of a unary method, so that nobody could be rejected before: handlers here are of
streams of one message, which clients cannot tell apart.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from serving.budget import ANSWER_COPIES
from serving.failures import Failure
from serving.gate import Gate
from serving.transport.unary import Deadline, Metadata, UnaryCall, UnaryMethod

_TO_REJECT = 8  # threads beside those that calls in a room may hold


class Behavior:
    """What a handler calls, with the attributes that gRPC reads: where it runs, and how.

    Args:
        call: The behavior itself.
        pool: Where it runs.
        experimental_non_blocking: Whether it sends its responses itself.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        pool: ThreadPoolExecutor,
        *,
        experimental_non_blocking: bool = False,
    ) -> None:
        self._call = call
        self.experimental_thread_pool = pool
        self.experimental_non_blocking = experimental_non_blocking

    def __call__(self, *arguments: Any) -> Any:
        """Do what the handler is for."""
        return self._call(*arguments)


class _ThreadCall(UnaryCall):
    """A call whose thread waits for its message, and for what it is answered.

    Args:
        context: Of the call.
        gate: What it came in by.
    """

    def __init__(self, context: grpc.ServicerContext, gate: Gate) -> None:
        self._context = context
        self._gate = gate
        self._deadline = Deadline(context.time_remaining())
        self._changed = threading.Condition()  # its lock may be taken twice
        self._pending: bytes | None = None
        self._failure: Failure | None = None
        self._is_ended = False
        self._is_finished = False

    def invocation_metadata(self) -> Metadata:
        return self._context.invocation_metadata() or ()

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        found: Mapping[str, Sequence[bytes]] = self._context.auth_context()  # type: ignore[assignment]
        return found

    def peer(self) -> str:
        name: str = self._context.peer()
        return name

    connection = property(peer)

    def time_remaining(self) -> float:
        return self._deadline.remaining()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return self._context.add_callback(callback)

    def hold(self, size: int) -> bool:
        return self._gate.room.hold(self, size)

    def answer(self, content: bytes) -> None:
        if self._end(content):
            self._gate.room.answer(self, ANSWER_COPIES * len(content))

    def fail(self, failure: Failure) -> None:
        if self._end(failure=failure):
            self._gate.room.answer(self)

    def give_up(self, *, late: bool) -> None:
        """End it, or cancel it where no status can be sent from another thread."""
        if not self._is_ended:
            self._gate.silent(late=late)
        self._context.cancel()

    def publish(self, content: bytes) -> None:
        with self._changed:
            if not self._is_ended:
                self._pending = content
                self._changed.notify()

    def finish(self) -> None:
        with self._changed:
            self._is_finished |= self._end(self._pending)

    @property
    def is_finished(self) -> bool:
        return self._is_finished

    def end(self) -> None:
        """End it, because gRPC has."""
        self._end()

    def responses(self) -> Iterator[bytes]:
        """Wait for what is sent; at the end the call has its status."""
        if not self._context.add_callback(self.end):
            self.end()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._is_ended)
                content, self._pending = self._pending, None
            if content is None:
                break
            yield content
        if self._failure is not None:
            self._failure.end(self._context)

    def _end(self, content: bytes | None = None, failure: Failure | None = None) -> bool:
        with self._changed:
            if self._is_ended:
                return False
            self._is_ended = True
            self._pending, self._failure = content, failure
            self._changed.notify()
        return True


def handler(method: UnaryMethod) -> "grpc.RpcMethodHandler[Any, Any]":
    """Make gRPC's handler of a method."""
    gate = method.gate
    threads = ThreadPoolExecutor(gate.room.most + method.watchers + _TO_REJECT, "request")

    def behave(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        call = _ThreadCall(context, gate)
        refusal = gate.refusal(call)
        if refusal is None and not gate.room.enter(call):
            refusal = gate.full()
        if refusal is not None:
            refusal.end(context)
        try:
            message = _next_message(messages, call, gate)
            if message is not None:
                method.take(message, call)
            yield from call.responses()
        finally:
            gate.room.answer(call)
            if method.watchers or not context.add_callback(lambda: gate.room.leave(call)):
                gate.room.leave(call)

    return grpc.stream_stream_rpc_method_handler(Behavior(behave, threads))


def _next_message(messages: Iterator[bytes], call: _ThreadCall, gate: Gate) -> bytes | None:
    """Wait for the message of a call; None if there is none, or it was given up."""
    try:
        message = next(messages, None)
    except grpc.RpcError:
        if gate.room.hear(call):  # or it was given up, which is counted
            gate.no_message(cancelled=True)
        raise
    if not gate.room.hear(call, len(message or b"")):
        call.end()
    elif message is None:  # or one that is too large, which gRPC does not tell apart here
        call.fail(gate.no_message(cancelled=False))
    else:
        return message
    return None


class ThreadHandlers(grpc.GenericRpcHandler):
    """Handlers of some methods.

    Args:
        handlers: By the path of the method.
    """

    def __init__(self, handlers: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]") -> None:
        self._handlers = handlers

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Find what handles a call; called in gRPC's own thread when a call arrives."""
        return self._handlers.get(details.method)
