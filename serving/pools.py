"""Where gRPC runs calls that have threads, and how a handler says so."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class CountingPool(ThreadPoolExecutor):
    """Threads for calls that never wait for one.

    Args:
        size: How many.
        name: Of the threads.
    """

    def __init__(self, size: int, name: str) -> None:
        super().__init__(size, name)
        self._size = size
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def full(self) -> bool:
        """Whether all threads are taken."""
        return self._taken >= self._size

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run a call in a thread."""
        with self._lock:
            self._taken += 1
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._give_back)
        return future

    def _give_back(self, _: "Future[Any]") -> None:
        with self._lock:
            self._taken -= 1


class Inline(ThreadPoolExecutor):
    """Runs a call at once, in the thread that it arrives in, which for a refusal is the fastest.

    gRPC takes no other kind of executor.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run a call, and return when it has ended."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


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
