"""grpc.health.v1: whether the server can be sent requests, and whether it lives.

The two are asked for under different names. Who restarts a server asks for `live`, which is SERVING
as long as the process answers and runs requests: one that drains, or has no model, must not be
killed for that.

The servicer of grpcio-health-checking is not used, for two reasons seen in 1.81: it keeps every
service name it was ever asked to watch, so a client can fill the memory, and it cannot end its
watches, so that one watcher makes every shutdown last the whole grace period.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb

from serving.callers import Callers, address_of
from serving.errors import ModelNotFound, Overloaded, VisibleError
from serving.failures import Failure, failure_of
from serving.gate import Gate
from serving.messages import PROBE_BYTES, SMALL_BYTES, parse
from serving.observability.metrics import Counters
from serving.pools import one_message
from serving.room import Places, Room

SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name
LIVE = "live"
"""The name by which liveness is asked for."""

_MOST_WATCHERS = 1024
_RESERVE = 0.25  # of the watches, for callers who are known
_RETRY_AFTER_S = 1.0

Send = Callable[[pb.HealthCheckResponse | None], None]


@dataclass(eq=False)
class _Watcher:
    """Who wants to be told of every change.

    Args:
        service: What it watches.
        send: Returns when the client's buffers have taken the message, which may be never.
    """

    service: str
    send: Send
    told: Any = None
    sending: threading.Lock = field(default_factory=threading.Lock)


class Health:
    """The same status for every service, and another for `LIVE`. Safe to call from several threads.

    At first it is not ready. Nothing here waits for a client: a watcher that does not read, or goes
    away while it is told, holds up neither the server nor the other watchers.

    Args:
        services: Names that may be asked for, beside `LIVE`; the empty one stands for the whole
            server.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset({*services, LIVE})
        self._lock = threading.Lock()  # never held while something is sent
        self._status = _status(False)
        self._live = _status(True)
        self._watchers: set[_Watcher] = set()
        # As many threads as watchers are stuck, and one more.
        self._senders = ThreadPoolExecutor(_MOST_WATCHERS, "health-watch")

    def set(self, ready: bool) -> None:
        """Change the status and have every watcher told."""
        with self._lock:
            changed = self._status != _status(ready)
            self._status = _status(ready)
        self._tell_all(changed)

    def set_live(self, live: bool) -> None:
        """Change the status of `LIVE` and notify every watcher."""
        with self._lock:
            changed = self._live != _status(live)
            self._live = _status(live)
        self._tell_all(changed)

    def close(self) -> None:
        """End every watch."""
        with self._lock:
            watchers = list(self._watchers)
            self._watchers.clear()
        for watcher in watchers:
            watcher.send(None)  # which does not wait

    def shutdown(self) -> None:
        """Tell no more watchers."""
        self._senders.shutdown(wait=False)

    def check(self, service: str) -> pb.HealthCheckResponse | None:
        """Give the status of a service; None if there is none of that name."""
        return self._status_of(service) if service in self._services else None

    def watch(
        self, service: str, send: Send, when_ended: Callable[[Callable[[], None]], bool]
    ) -> None:
        """Have a watcher told of a status, and of every change; it returns before anything is sent.

        It is called in gRPC's own thread, which must be free for a response to be sent.

        Args:
            service: What it watches.
            send: Takes a response, or None for the end.
            when_ended: Takes what is to be called when the watcher has gone; tells whether it has
                not yet.
        """
        if service not in self._services:
            self._senders.submit(_send_unknown, send)
            return
        watcher = _Watcher(service, send)

        def forget() -> None:  # called in gRPC's own thread, which nothing may hold up
            with self._lock:
                self._watchers.discard(watcher)

        with self._lock:
            if when_ended(forget):
                self._watchers.add(watcher)
        self._senders.submit(self._tell, watcher)

    def _tell_all(self, changed: bool) -> None:
        with self._lock:
            watchers = list(self._watchers) if changed else []
        for watcher in watchers:
            self._senders.submit(self._tell, watcher)

    def _tell(self, watcher: _Watcher) -> None:
        """Send a watcher what is so now, if it has not been told."""
        # Whoever is sending already looks again when that is done.
        while watcher.told != self._status_of(watcher.service) and watcher.sending.acquire(
            blocking=False
        ):
            try:
                watcher.told = self._status_of(watcher.service)
                watcher.send(watcher.told)
            finally:
                watcher.sending.release()

    def _status_of(self, service: str) -> Any:
        return self._live if service == LIVE else self._status


def _send_unknown(send: Send) -> None:
    send(pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN))
    send(None)


def _status(ready: bool) -> Any:
    kind = pb.HealthCheckResponse
    return kind(status=kind.SERVING if ready else kind.NOT_SERVING)


class HealthHandlers(grpc.GenericRpcHandler):
    """The handlers of `grpc.health.v1.Health`.

    Calls of it and requests never wait for each other.

    Args:
        health: What answers.
        callers: Who is known, for whom some watches are kept.
        probes: Room for calls that are open to everybody.
        peer_share: Part of the watches that one address may have, while it is not known whose.
        counters: Count the calls.
    """

    def __init__(
        self,
        health: Health,
        callers: Callers,
        probes: Room,
        peer_share: float,
        counters: Counters,
    ) -> None:
        self._health = health
        self._counters = counters
        self._callers = callers
        self._places = Places(_MOST_WATCHERS, peer_share, _RESERVE if callers.are_named else 0.0)
        to_bytes = pb.HealthCheckResponse.SerializeToString
        self._handlers = {
            f"/{SERVICE}/Check": one_message(
                self._gate("Check", probes), self._check, response_serializer=to_bytes
            ),
            f"/{SERVICE}/Watch": one_message(
                self._gate("Watch", probes), self._watch, watched=True, response_serializer=to_bytes
            ),
        }

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Find what handles a call; called in gRPC's own thread when a call arrives."""
        return self._handlers.get(details.method)

    def _gate(self, method: str, probes: Room) -> Gate:
        return Gate(
            probes,
            partial(self._callers.admit, None),
            partial(self._refused, method),
            lambda: _RETRY_AFTER_S,
            SMALL_BYTES,
            always=True,
        )

    def _check(self, raw: bytes, context: grpc.ServicerContext) -> pb.HealthCheckResponse:
        found = self._health.check(self._service("Check", raw, context))
        if found is None:
            self._refused("Check", ModelNotFound("there is no such service")).end(context)
        self._counters.count_call("Check", "OK")
        return found

    def _watch(self, raw: bytes, context: grpc.ServicerContext, send: Send) -> None:
        service = self._service("Watch", raw, context)
        peer = address_of(context)
        if not self._places.take(peer, known=self._callers.knows(context)):
            error = Overloaded("there is no room for more watches", _RETRY_AFTER_S)
            self._refused("Watch", error).end(context)
        codes = ["CANCELLED"]

        def end() -> None:
            self._places.give_back(peer)
            self._counters.count_call("Watch", codes[-1])

        def send_and_note(response: pb.HealthCheckResponse | None) -> None:
            if response is None:
                codes.append("OK")
            send(response)

        if context.add_callback(end):
            self._health.watch(service, send_and_note, context.add_callback)
        else:
            end()

    def _service(self, method: str, raw: bytes, context: grpc.ServicerContext) -> str:
        """Read which service is asked for."""
        try:
            name: str = parse(pb.HealthCheckRequest, raw, PROBE_BYTES).service
        except VisibleError as error:
            self._refused(method, error).end(context)
        return name

    def _refused(self, method: str, error: Exception) -> Failure:
        """Count a call that has no answer, and find how it ends."""
        failure = failure_of(f"{SERVICE}/{method}", None, error)
        self._counters.count_call(method, failure.code.name, failure.reason)
        return failure
