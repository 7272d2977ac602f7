"""grpc.health.v1: whether the server can be sent requests.

The servicer of grpcio-health-checking is not used, for two reasons seen in 1.81: it keeps every
service name it was ever asked to watch, so a client can fill the memory, and it cannot end its
watches, so that one watcher makes every shutdown last the whole grace period.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as pb_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name

_THREADS = 2

Send = Callable[[pb.HealthCheckResponse | None], None]


class HealthService(pb_grpc.HealthServicer):  # type: ignore[misc]
    """The same status for every service it knows. Safe to call from several threads.

    At first it is not ready.

    Args:
        services: Names that may be asked for; the empty one stands for the whole server.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._lock = threading.Lock()
        self._status = _status(False)
        self._watchers: set[Send] = set()
        # Calls never wait behind requests, nor requests behind them.
        pool = self._pool = ThreadPoolExecutor(_THREADS, "health")
        # gRPC reads these attributes; they make it run a call in this pool, and let a stream
        # live on without a thread. On the instance, because another server has another pool.
        self.Check = partial(self._check)
        self.Check.experimental_thread_pool = pool  # type: ignore[attr-defined]
        self.Watch = partial(self._watch)
        self.Watch.experimental_thread_pool = pool  # type: ignore[attr-defined]
        self.Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def set(self, ready: bool) -> None:
        """Change the status and tell every watcher."""
        with self._lock:
            if self._status != _status(ready):
                self._status = _status(ready)
                for send in self._watchers:
                    send(self._status)

    def close(self) -> None:
        """End every watch."""
        with self._lock:
            for send in self._watchers:
                send(None)
            self._watchers.clear()

    def shutdown(self) -> None:
        """Start no more calls."""
        self._pool.shutdown(wait=False)

    def _check(
        self, request: pb.HealthCheckRequest, context: grpc.ServicerContext
    ) -> pb.HealthCheckResponse:
        if request.service not in self._services:
            context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return self._status

    def _watch(
        self, request: pb.HealthCheckRequest, context: grpc.ServicerContext, send: Send
    ) -> None:
        if request.service not in self._services:
            send(pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN))
            send(None)
            return

        def forget() -> None:
            with self._lock:
                self._watchers.discard(send)

        with self._lock:
            if context.add_callback(forget):
                self._watchers.add(send)
            send(self._status)


def _status(ready: bool) -> Any:
    kind = pb.HealthCheckResponse
    return kind(status=kind.SERVING if ready else kind.NOT_SERVING)
