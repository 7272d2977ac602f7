"""grpc.reflection: what services there are, for tools that have no .proto."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

SERVICE: str = reflection.SERVICE_NAME
_THREADS = 2


class Reflection(reflection.ReflectionServicer):  # type: ignore[misc]
    """Reflection in threads of its own, whose streams can be ended.

    Args:
        services: Names of the services that are told of.
    """

    def __init__(self, services: tuple[str, ...]) -> None:
        super().__init__(services)
        self._open: set[grpc.ServicerContext] = set()
        self._lock = threading.Lock()
        # Not `_pool`: the base class has its descriptors there.
        self._threads = ThreadPoolExecutor(_THREADS, "reflection")
        # gRPC reads the attribute from the handler; see HealthService.
        answer = super().ServerReflectionInfo
        self.ServerReflectionInfo = partial(self._tracked, answer)
        self.ServerReflectionInfo.experimental_thread_pool = self._threads  # type: ignore[attr-defined]

    def close(self) -> None:
        """End every stream."""
        with self._lock:
            for context in self._open:
                context.cancel()

    def shutdown(self) -> None:
        """Start no more calls."""
        self._threads.shutdown(wait=False)

    def _tracked(self, answer: Any, requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with self._lock:
            self._open.add(context)
        try:
            yield from answer(requests, context)
        finally:
            with self._lock:
                self._open.discard(context)
