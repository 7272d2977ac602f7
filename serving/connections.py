"""Connections: how many there may be, and which ones must go when there are too many.

gRPC has one limit for all connections of a port, so one address could take them all, and does not
say whose they are. Their sockets are this process's own, so they are found among its open files:
whoever has sent nothing goes first, then those of the address with the most, the longest idle
first. Only Linux tells all of it; elsewhere gRPC's own limits are what there is.
"""

import os
import resource
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from serving.room import peer_of

HEALTH_CONNECTIONS = 64
"""To the port of health alone, if it has one."""

_KEPT_FILES = 128 + HEALTH_CONNECTIONS  # also for models, logs, metrics and libraries
_MOST = 4096  # connections by default, however many files may be open
_FEWEST = 16
_LOOK_S = 0.25
_LOOKING_SHARE = 0.05  # of the time, at most, however many connections there are
_FIRST_WORDS_BYTES = 24  # that every client of HTTP/2 begins with, RFC 9113, section 3.4
_FILES = Path("/proc/self/fd")
# tcpi_last_data_recv (ms) and tcpi_bytes_received of Linux's struct tcp_info
_TCP_INFO = struct.Struct("=52x I 72x Q")

_log = structlog.get_logger()


def most_connections(wanted: int | None) -> int:
    """Choose how many connections there may be, and let this process open as many files.

    Args:
        wanted: As it was set; None takes what open files allow, up to a few thousand.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with suppress(ValueError, OSError):  # some systems allow fewer than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    allowed = sys.maxsize if soft == resource.RLIM_INFINITY else soft - _KEPT_FILES
    return max(_FEWEST, min(wanted or _MOST, allowed))


@contextmanager
def guarding(ports: Set[int], most: int, peer_share: float) -> Iterator[None]:
    """Close connections while there are too many, from a thread of its own.

    Args:
        ports: Of this process, whose connections count.
        most: Connections that there may be.
        peer_share: Part of them that one address may have.
    """
    if not _FILES.is_dir():
        yield
        return
    stopped = threading.Event()
    guard = _Guard(ports, most, peer_share)

    def look() -> None:
        pause = _LOOK_S
        while not stopped.wait(pause):
            started = time.monotonic()
            guard.look()
            pause = max(_LOOK_S, (time.monotonic() - started) / _LOOKING_SHARE)

    thread = threading.Thread(target=look, name="connections", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@dataclass(frozen=True)
class _Connection:
    """A connection, as the kernel sees it.

    Args:
        file: A number of the process's own for its socket, as long as it is not closed.
        peer: Whose it is; see `peer_of`.
        port: The client's.
        idle_ms: Since its last bytes came.
        received: Bytes that have come.
    """

    file: socket.socket
    peer: str
    port: int
    idle_ms: int
    received: int


class _Guard:
    def __init__(self, ports: Set[int], most: int, peer_share: float) -> None:
        self._ports = ports
        self._most = most
        self._most_each = max(1, int(most * peer_share))
        self._silent: Set[tuple[str, int]] = frozenset()

    def look(self) -> None:
        """Look at the connections once, and close those that are too many."""
        # Below it no address can have too many.
        if sum(1 for _ in _FILES.iterdir()) <= self._most_each:
            self._silent = frozenset()
            return
        found = list(_connections(self._ports))
        try:
            self._close_some(found)
        finally:
            for each in found:
                each.file.close()

    def _close_some(self, found: list[_Connection]) -> None:
        silent = {
            (each.peer, each.port): each for each in found if each.received < _FIRST_WORDS_BYTES
        }
        closed = [silent[key] for key in silent.keys() & self._silent]  # for two looks by now
        self._silent = silent.keys() - {(each.peer, each.port) for each in closed}
        left = sorted(set(found) - set(closed), key=lambda each: -each.idle_ms)
        taken = Counter(each.peer for each in left)
        for each in left:
            if taken[each.peer] > self._most_each:
                taken[each.peer] -= 1
                closed.append(each)
        for each in closed:
            with suppress(OSError):  # it has gone by itself
                each.file.shutdown(socket.SHUT_RDWR)
        if closed:
            worst, _ = Counter(each.peer for each in closed).most_common(1)[0]
            _log.warning("connections_closed", connections=len(closed), of=len(found), peer=worst)


def _connections(ports: Set[int]) -> Iterator[_Connection]:
    """Find the connections to some ports of this process."""
    for entry in _FILES.iterdir():
        with suppress(OSError):  # closed in between, or no connection
            if not str(entry.readlink()).startswith("socket:"):
                continue
            file = socket.socket(fileno=os.dup(int(entry.name)))
            try:
                if (
                    file.family in (socket.AF_INET, socket.AF_INET6)
                    and file.getsockname()[1] in ports
                ):
                    host, port = file.getpeername()[:2]
                    info = file.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
                    idle_ms, received = _TCP_INFO.unpack(info)
                    peer = peer_of(f"tcp:{host}:{port}")
                    yield _Connection(file, peer, port, idle_ms, received)
                    continue
            except (OSError, struct.error):
                pass
            file.close()
