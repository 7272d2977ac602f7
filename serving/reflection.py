"""grpc.reflection: what services there are, for tools that have no .proto."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from serving.callers import Callers, address_of
from serving.errors import Overloaded, VisibleError
from serving.failures import failure_of
from serving.messages import PROBE_BYTES, parse
from serving.pools import Behavior, InThread
from serving.room import Places, Room

SERVICE: str = reflection.SERVICE_NAME
_STREAMS = 32
_RETRY_AFTER_S = 1.0


class ReflectionHandlers(grpc.GenericRpcHandler):
    """The handlers of reflection: streams in threads of its own, which can be ended.

    A stream that asks nothing for as long as a call may take to send its message is ended.

    Args:
        services: Names of the services that are told of.
        callers: Looked at for what is too large alone; reflection is open to everybody.
        peer_share: Part of the streams that one address may have.
        patience_s: How long a stream may ask nothing, in seconds.
        most_silent: Streams at a time that ask nothing, each of which may be sending a message as
            large as any may be.
    """

    def __init__(
        self,
        services: tuple[str, ...],
        callers: Callers,
        peer_share: float,
        patience_s: float,
        most_silent: int,
    ) -> None:
        self._answer = reflection.ReflectionServicer(services).ServerReflectionInfo
        self._callers = callers
        self._places = Places(_STREAMS, peer_share)
        self.silent = Room(_STREAMS, patience_s, most_silent)
        self._open: set[grpc.ServicerContext] = set()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_STREAMS + 1, "reflection")
        self._handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            Behavior(self._stream, self._threads),
            response_serializer=ServerReflectionResponse.SerializeToString,
        )

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Find what handles a call."""
        return self._handler if details.method == f"/{SERVICE}/ServerReflectionInfo" else None

    def close(self) -> None:
        """End every stream."""
        with self._lock:
            for context in self._open:
                context.cancel()

    def shutdown(self) -> None:
        """Start no more calls."""
        self._threads.shutdown(wait=False)

    def _stream(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        peer = address_of(context)
        try:
            self._callers.admit(None, context)
            if not self._places.take(peer):
                raise Overloaded("there is no room for another stream", _RETRY_AFTER_S)
        except VisibleError as error:
            failure_of(SERVICE, None, error).end(context)
        with self._lock:
            self._open.add(context)
        try:
            yield from self._answer(self._requests(messages, context), context)
        except VisibleError as error:
            failure_of(SERVICE, None, error).end(context)
        finally:
            self._places.give_back(peer)
            with self._lock:
                self._open.discard(context)

    def _requests(
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[ServerReflectionRequest]:
        """Read the requests of a stream, each in time."""
        waiting = InThread(context)
        try:
            while True:
                self.silent.leave(waiting)
                self.silent.enter(waiting)  # until the next one: who reads no answers waits, too
                raw = next(messages, None)
                if raw is None:
                    return
                yield parse(ServerReflectionRequest, raw, PROBE_BYTES)
        finally:
            self.silent.leave(waiting)
