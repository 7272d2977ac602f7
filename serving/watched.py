"""Files that are read again when they change, such as certificates that are renewed.

A file may be replaced by another, by a link to another (as Kubernetes does), or be written to. What
is there but cannot be used is logged, once, and what was there before goes on being used.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from serving.errors import StartupError

Value = TypeVar("Value")

_log = structlog.get_logger()


class Watched(Generic[Value]):
    """What some files say now. Safe to call from several threads.

    Args:
        files: They belong together.
        read: Reads them all; raises StartupError if they cannot be used.
        pause_s: They are looked at no more often than so.
        clock: Seconds, never going back.

    Raises:
        StartupError: They cannot be used from the start.
    """

    def __init__(
        self,
        files: Sequence[Path],
        read: Callable[[], Value],
        pause_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = files
        self._read = read
        self._pause_s = pause_s
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = self._look()
        self._looked = clock()
        self._value = read()

    def get(self) -> Value:
        """Give what the files say, as far as it can be used."""
        if self._clock() - self._looked < self._pause_s:
            return self._value
        with self._lock:
            self._looked = self._clock()
            seen = self._look()
            if seen != self._seen:
                names = [str(file) for file in self._files]
                try:
                    self._value = self._read()
                    _log.info("files_read_again", files=names)
                except StartupError as error:
                    _log.error("files_not_usable", files=names, reason=str(error))
                self._seen = seen
        return self._value

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_state(file) for file in self._files]


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
