"""How a handler tells gRPC what runs its calls."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from serving import arrivals
from serving.arrivals import Arrival, Arrivals
from serving.budget import ANSWER_COPIES
from serving.gate import Gate
from serving.messages import is_compressed

_TO_REFUSE = 8  # threads beside those that calls in a room may hold


class Behavior:
    """What a handler calls, with the attributes that gRPC reads: where it runs, and how.

    Args:
        call: The behavior itself; None if the pool does without.
        pool: Where it runs.
        experimental_non_blocking: Whether it sends its responses itself.
    """

    def __init__(
        self,
        call: Callable[..., Any] | None,
        pool: ThreadPoolExecutor,
        *,
        experimental_non_blocking: bool = False,
    ) -> None:
        self._call = call
        self.experimental_thread_pool = pool
        self.experimental_non_blocking = experimental_non_blocking

    def __call__(self, *arguments: Any) -> Any:
        """Do what the handler is for."""
        assert self._call is not None
        return self._call(*arguments)


def one_message(
    gate: Gate,
    behavior: Callable[..., Any],
    pool: Executor | None = None,
    *,
    begin: Callable[[bytes, Arrival], None] | None = None,
    watched: bool = False,
    response_serializer: Callable[[Any], bytes] | None = None,
) -> "grpc.RpcMethodHandler[Any, Any]":
    """Make the handler of a method of one message, which is given as bytes.

    Args:
        gate: Lets calls in, before their message is read.
        behavior: Answers, from the message and the context; with `watched` also from a function
            that sends a response, or None for the end, and may be called after it returns.
        pool: Where it runs once the message is there; None is in gRPC's own thread.
        begin: Takes the message in in place of `behavior`, where calls need no thread.
        watched: Whether there are several responses.
        response_serializer: Of a response; None if responses are bytes.
    """
    if arrivals.SUPPORTED:
        method = (
            grpc.unary_stream_rpc_method_handler if watched else grpc.unary_unary_rpc_method_handler
        )
        arriving = Arrivals(gate, begin or _running_in(pool))
        return method(
            Behavior(behavior, arriving, experimental_non_blocking=watched),
            response_serializer=response_serializer,
        )
    # As if there were several messages: of a single one gRPC calls the behavior when it is there.
    method = (
        grpc.stream_stream_rpc_method_handler if watched else grpc.stream_unary_rpc_method_handler
    )
    threads = ThreadPoolExecutor(gate.room.most + _TO_REFUSE, "request")
    return method(
        Behavior(_after_gate(gate, behavior), threads, experimental_non_blocking=watched),
        response_serializer=response_serializer,
    )


def _running_in(pool: Executor | None) -> Callable[[bytes, Arrival], None]:
    if pool is None:
        return lambda message, arrival: arrival.run(message)

    def begin(message: bytes, arrival: Arrival) -> None:
        pool.submit(arrival.run, message)

    return begin


def _after_gate(gate: Gate, behavior: Callable[..., Any]) -> Callable[..., Any]:
    """Let a call in and wait for its message, in a thread."""

    def behave(messages: Iterator[bytes], context: grpc.ServicerContext, *send: Any) -> Any:
        call = InThread(context, gate)
        refusal = gate.refusal(context)
        if refusal is None and not gate.room.enter(call):
            refusal = gate.full()
        if refusal is not None:
            refusal.end(context)
        answer = None
        try:
            message = _next_message(messages, call)
            if message is None:
                return None
            answer = behavior(message, context, *send)
            return answer
        finally:
            call.is_answered = True
            size = len(answer) if isinstance(answer, bytes) else 0
            gate.room.answer(call, ANSWER_COPIES * size)
            # What is watched lasts as long as its client likes.
            if send or not context.add_callback(lambda: gate.room.leave(call)):
                gate.room.leave(call)

    return behave


def _next_message(messages: Iterator[bytes], call: "InThread") -> bytes | None:
    """Wait for the message of a call; None if it was given up."""
    gate = call.gate
    assert gate is not None
    try:
        message = next(messages, None)
    except grpc.RpcError:
        if gate.room.hear(call):  # or it was given up, which is counted
            gate.no_message(cancelled=True)
        raise
    if not gate.room.hear(call, len(message or b"")):
        return None
    if message is None:  # or one that is too large, which gRPC does not tell apart here
        gate.no_message(cancelled=False).end(call.context)
    refusal = gate.hold(call, message, inflated=is_compressed(message))
    if refusal is not None:
        refusal.end(call.context)
    return message


@dataclass(eq=False)
class InThread:
    """A call whose thread waits for its message.

    Args:
        context: Of the call.
        gate: What it came in by; None if it is not counted there.
        is_answered: Whether its thread has gone on.
    """

    context: grpc.ServicerContext
    gate: Gate | None = None
    is_answered: bool = False

    @property
    def connection(self) -> str:
        """Its connection, as gRPC names it."""
        name: str = self.context.peer()
        return name

    def give_up(self, *, late: bool) -> None:
        """Cancel it, because no status can be sent from another thread."""
        if self.gate is not None and not self.is_answered:
            self.gate.silent(late=late)
        self.context.cancel()
