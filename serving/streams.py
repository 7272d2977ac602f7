"""Streams of requests, each with a thread, whose requests are answered one by one.

gRPC reads no message of a stream before it is asked for the next one.
"""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc

from protos import inference_pb2 as pb
from serving.budget import ANSWER_COPIES, MESSAGE_COPIES
from serving.callers import Callers, address_of
from serving.errors import Cancelled, ModelNotReady, Overloaded, TooLarge, VisibleError
from serving.failures import Failure, failure_of
from serving.requests import METHOD_STREAM, Requests
from serving.room import Places, Room
from serving.transport import stream_messages
from serving.transport.threads import Behavior
from serving.transport.unary import Deadline

_STRICT = ("triton_grpc_error", "true")  # a stream is to end with a status at the first error
_TO_REFUSE = 8  # threads beside those that streams hold
_RETRY_AFTER_S = 1.0
_STOPPING = ModelNotReady("the server is stopping; go on elsewhere")


class Streams:
    """The streams that are open.

    Args:
        requests: Answers them.
        callers: Who may open one.
        max_streams: Streams open at a time.
        peer_share: Part of them that one address may have, while it is not known whose.

    Attributes:
        room: Where they wait for messages, and for their answers to be taken.
        handler: What gRPC calls.
    """

    def __init__(
        self, requests: Requests, callers: Callers, max_streams: int, peer_share: float
    ) -> None:
        self._requests = requests
        self._callers = callers
        self._places = Places(max_streams, peer_share)
        self.room = Room(max_streams + 1, math.inf, budget=requests.budget)
        self._threads = ThreadPoolExecutor(max_streams + _TO_REFUSE, "stream")
        self._open: set[_Stream] = set()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self.handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            Behavior(self._stream, self._threads, experimental_non_blocking=True)
        )

    def close(self) -> None:
        """End every stream, each after what it is working on, so that clients go elsewhere."""
        self._closing.set()
        with self._lock:
            streams = list(self._open)
        for stream in streams:
            stream.end_if_idle(_STOPPING)

    def shutdown(self) -> None:
        """Start no more."""
        self._threads.shutdown(wait=False)

    def _stream(
        self,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
        send: Callable[[bytes | None], None],
    ) -> None:
        """Answer the requests of a stream one by one; gRPC reads none before it is asked for."""
        peer = address_of(context)
        try:
            self._callers.admit("inference", context)
            self._requests.require_budget()
            if not self._places.take(peer, known=self._callers.knows(context)):
                raise Overloaded(
                    "the server has no room for another stream", self._requests.retry_after_s()
                )
        except VisibleError as error:
            self._refused(error).end(context)
        try:
            self._answer_stream(
                stream_messages.watched(messages),
                _Stream(context, send, Deadline(context.time_remaining()), self._refused),
            )
        finally:
            self._places.give_back(peer)

    def _answer_stream(self, messages: Iterator[bytes], stream: "_Stream") -> None:
        strict = _STRICT in {(key, value) for key, value in stream.context.invocation_metadata()}
        with self._lock:
            self._open.add(stream)
        try:
            while (raw := self._next_message(messages, stream)) is not None:
                with stream.busy:
                    if stream.ended:
                        return
                    response = self._stream_response(raw, stream, strict=strict)
                    del raw
                    self.room.answer(stream, ANSWER_COPIES * len(response))
                    stream.send(response)
                if self._closing.is_set():
                    break
            if self._closing.is_set():
                stream.end_if_idle(_STOPPING)
            elif not stream.ended:
                stream.send(None)
        finally:
            self.room.leave(stream)
            with self._lock:
                self._open.discard(stream)

    def _next_message(self, messages: Iterator[bytes], stream: "_Stream") -> bytes | None:
        """Wait for the next message of a stream; None if there is none."""
        self.room.leave(stream)
        self.room.enter(stream)
        try:
            raw = next(messages, None)
        except grpc.RpcError:
            if self.room.hear(stream) and not stream.ended:  # which is counted
                self._refused(_end_of(messages) or Cancelled("cancelled"))
            raise
        if not self.room.hear(stream, len(raw or b"")) or stream.ended:
            return None
        if error := _end_of(messages):
            self._refused(error)
        return raw

    def _refused(self, error: VisibleError) -> Failure:
        return self._requests.refused(METHOD_STREAM, error)

    def _stream_response(self, raw: bytes, stream: "_Stream", *, strict: bool) -> bytes:
        record = self._requests.telemetry.begin(METHOD_STREAM, stream.context)
        request = None
        hold = partial(self.room.hold, stream)
        try:
            if not hold(MESSAGE_COPIES * len(raw)):
                raise self._requests.over_budget()
            request = self._requests.parse(raw, hold)
            answer = self._requests.service.infer(request, stream, in_stream=True)
            record.answered(answer)
            return answer.content
        except Exception as error:
            failure = failure_of(METHOD_STREAM, request, error)
            record.failed(failure, request)
            if strict:
                failure.end(stream.context)
            empty = pb.ModelInferResponse(id=request.id if request else "")
            return pb.ModelStreamInferResponse(
                error_message=failure.details, infer_response=empty
            ).SerializeToString()


def _end_of(messages: Iterator[bytes]) -> TooLarge | None:
    """Tell whether messages end because one is too large, for which gRPC ends the call."""
    if stream_messages.is_too_large(messages):
        return TooLarge("expected a message of at most --max-message-bytes, found a larger one")
    return None


@dataclass(eq=False)
class _Stream:
    """A stream that is open, and the `Call` of each of its requests in turn.

    Args:
        context: Of the stream.
        send: Takes a response, or None for the end.
        deadline: Of the stream.
        refused: Counts an error that it ends with, and finds what its client is told.
    """

    context: grpc.ServicerContext
    send: Callable[[bytes | None], None]
    deadline: Deadline
    refused: Callable[[VisibleError], Failure]
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

    @property
    def connection(self) -> str:
        """Its connection, as gRPC names it."""
        name: str = self.context.peer()
        return name

    def give_up(self, *, late: bool) -> None:
        """End it, because a message takes too much before it is whole, or an answer waits."""
        error = Overloaded("the server needs the memory of what has come", _RETRY_AFTER_S)
        if not self.end_if_idle(error):
            self.refused(error)
            self.context.cancel()

    def end_if_idle(self, error: VisibleError) -> bool:
        """End it, unless it is working on a request, after which it looks by itself.

        Args:
            error: Why.

        Returns:
            Whether it has ended.
        """
        if not self.busy.acquire(blocking=False):
            return False
        try:
            if not self.ended:
                self.ended = True
                failure = self.refused(error)
                self.context.set_code(failure.code)
                self.context.set_details(failure.details)
                self.context.set_trailing_metadata(failure.trailing)
                self.send(None)
        finally:
            self.busy.release()
        return True
