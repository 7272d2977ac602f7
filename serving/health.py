"""grpc.health.v1: whether the server can be sent requests, and whether it lives.

The two are asked for under different names. Who restarts a server asks for `live`, which is SERVING
as long as the process answers: one that drains, or has no model, must not be killed for that.

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
from grpc_health.v1 import health_pb2_grpc as pb_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name
LIVE = "live"
"""The name by which liveness is asked for."""

_THREADS = 2
_MOST_WATCHERS = 1024

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


class HealthService(pb_grpc.HealthServicer):  # type: ignore[misc]
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
        self._watchers: set[_Watcher] = set()
        # Calls never wait behind requests, nor requests behind them.
        pool = self._pool = ThreadPoolExecutor(_THREADS, "health")
        # As many threads as watchers are stuck, and one more.
        self._senders = ThreadPoolExecutor(_MOST_WATCHERS, "health-watch")
        # gRPC reads these attributes; they make it run a call in this pool, and let a stream
        # live on without a thread. On the instance, because another server has another pool.
        self.Check = partial(self._check)
        self.Check.experimental_thread_pool = pool  # type: ignore[attr-defined]
        self.Watch = partial(self._watch)
        self.Watch.experimental_thread_pool = pool  # type: ignore[attr-defined]
        self.Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def set(self, ready: bool) -> None:
        """Change the status and have every watcher told."""
        with self._lock:
            if self._status == _status(ready):
                return
            self._status = _status(ready)
            watchers = list(self._watchers)
        for watcher in watchers:
            self._senders.submit(self._tell, watcher)

    def close(self) -> None:
        """End every watch."""
        with self._lock:
            watchers = list(self._watchers)
            self._watchers.clear()
        for watcher in watchers:
            watcher.send(None)  # which does not wait

    def shutdown(self) -> None:
        """Start no more calls."""
        self._pool.shutdown(wait=False)
        self._senders.shutdown(wait=False)

    def _check(
        self, request: pb.HealthCheckRequest, context: grpc.ServicerContext
    ) -> pb.HealthCheckResponse:
        if request.service not in self._services:
            context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return self._status_of(request.service)

    def _watch(
        self, request: pb.HealthCheckRequest, context: grpc.ServicerContext, send: Send
    ) -> None:
        if request.service not in self._services:
            send(pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN))
            send(None)
            return
        watcher = _Watcher(request.service, send)

        def forget() -> None:  # called in gRPC's own thread, which nothing may hold up
            with self._lock:
                self._watchers.discard(watcher)

        with self._lock:
            full = len(self._watchers) >= _MOST_WATCHERS
            if not full and context.add_callback(forget):
                self._watchers.add(watcher)
        if full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "there is no room for more watches")
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
        return _status(True) if service == LIVE else self._status


def _status(ready: bool) -> Any:
    kind = pb.HealthCheckResponse
    return kind(status=kind.SERVING if ready else kind.NOT_SERVING)
