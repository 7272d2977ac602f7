"""Work that is done again and again, in a thread of its own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

_log = structlog.get_logger()


@contextmanager
def repeating(
    name: str, work: Callable[[], float | None], pause_s: float, join_s: float | None = None
) -> Iterator[None]:
    """Repeat some work as long as the block runs. An error is logged, and the work goes on.

    Args:
        name: Of the thread.
        work: What is repeated. It may return a longer pause than the usual one, in seconds.
        pause_s: From the end of one run to the start of the next, in seconds.
        join_s: How long to wait at the end for a run that is under way, in seconds; None waits for
            its end.
    """
    ended = threading.Event()

    def run() -> None:
        pause = pause_s
        while not ended.wait(pause):
            try:
                pause = max(pause_s, work() or 0.0)
            except Exception as error:
                _log.error("periodic_work_failed", work=name, exc_info=error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(join_s)
