"""grpc.reflection: what services there are, for tools that have no .proto."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from serving.budget import Budget
from serving.callers import Callers, address_of
from serving.errors import Cancelled, Overloaded, TooLarge, VisibleError
from serving.failures import Failure, failure_of
from serving.messages import PROBE_BYTES, parse
from serving.observability.metrics import Counters
from serving.room import Places, Room
from serving.transport import stream_messages
from serving.transport.threads import Behavior

SERVICE: str = reflection.SERVICE_NAME
_METHOD = "ServerReflectionInfo"
_TOO_LARGE = TooLarge("a message was too large")
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
        counters: Count the streams.
        budget: Is told of messages that have come.
    """

    def __init__(
        self,
        services: tuple[str, ...],
        callers: Callers,
        peer_share: float,
        patience_s: float,
        most_silent: int,
        counters: Counters,
        budget: Budget,
    ) -> None:
        self._answer = reflection.ReflectionServicer(services).ServerReflectionInfo
        self._callers = callers
        self._places = Places(_STREAMS, peer_share)
        self._counters = counters
        self.silent = Room(_STREAMS, patience_s, most_silent, budget)
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
            self._refused(error).end(context)
        with self._lock:
            self._open.add(context)
        messages = stream_messages.watched(messages)
        try:
            yield from self._answer(self._requests(messages, context), context)
            if stream_messages.is_too_large(messages):
                self._refused(_TOO_LARGE)  # gRPC ends it so
            elif not context.is_active():
                self._refused(Cancelled("cancelled"))
            else:
                self._counters.count_call(_METHOD, "OK")
        except VisibleError as error:
            self._refused(error).end(context)
        except (grpc.RpcError, GeneratorExit):  # it has ended, by its client or by us
            too_large = stream_messages.is_too_large(messages)
            self._refused(_TOO_LARGE if too_large else Cancelled("cancelled"))
            raise
        finally:
            self._places.give_back(peer)
            with self._lock:
                self._open.discard(context)

    def _refused(self, error: Exception) -> Failure:
        """Count a stream that ends with an error, and find how."""
        failure = failure_of(SERVICE, None, error)
        self._counters.count_call(_METHOD, failure.code.name, failure.reason)
        return failure

    def _requests(
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[ServerReflectionRequest]:
        """Read the requests of a stream, each in time."""
        waiting = _Stream(context)
        try:
            while True:
                self.silent.leave(waiting)
                self.silent.enter(waiting)  # until the next one: who reads no answers waits, too
                raw = next(messages, None)
                if raw is None:
                    return
                self.silent.note(waiting, len(raw))
                yield parse(ServerReflectionRequest, raw, PROBE_BYTES)
        finally:
            self.silent.leave(waiting)


@dataclass(eq=False)
class _Stream:
    """A stream that waits for a message.

    Args:
        context: Of it.
    """

    context: grpc.ServicerContext

    @property
    def connection(self) -> str:
        """The connection, as gRPC names it."""
        name: str = self.context.peer()
        return name

    def give_up(self, *, late: bool) -> None:
        """Cancel it, because no status can be sent from another thread."""
        self.context.cancel()
