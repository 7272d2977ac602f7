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
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from serving.periodic import repeating
from serving.room import Endpoint, network_of, plain_address

HEALTH_CONNECTIONS = 64
"""To the port of health alone, if it has one."""

_KEPT_FILES = 128 + HEALTH_CONNECTIONS  # also for models, logs, metrics and libraries
_MOST = 4096  # connections by default, however many files may be open
_FEWEST = 16
_LOOK_S = 0.25
_SPARE = 4
_KEPT_SHARE = 0.875  # of the connections that may be taken before the idlest are closed
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
def guarding(limits: Mapping[int, int], peer_share: float) -> Iterator[None]:
    """Close connections while there are too many, from a thread of its own.

    Args:
        limits: Connections that there may be to each of this process's ports.
        peer_share: Part of them that one address may have.
    """
    if not _FILES.is_dir():
        yield
        return
    guard = _Guard(limits, peer_share)

    def look() -> float:
        started = time.monotonic()
        guard.look()
        return (time.monotonic() - started) / _LOOKING_SHARE

    with closing(guard), repeating("connections", look, _LOOK_S):
        yield


@dataclass(frozen=True)
class _Connection:
    """A connection, as the kernel sees it.

    Args:
        file: Its number among this process's open files.
        socket: The kernel's number of its socket, which no other has while this one lives.
        port: This process's.
        peer: Whose it is; see `network_of`.
        endpoint: Its other side.
        idle_ms: Since its last bytes came.
        received: Bytes that have come.
    """

    file: int
    socket: int
    port: int
    peer: str
    endpoint: Endpoint
    idle_ms: int
    received: int


class _Guard:
    def __init__(self, limits: Mapping[int, int], peer_share: float) -> None:
        self._limits = limits
        self._most_each = {port: max(1, int(most * peer_share)) for port, most in limits.items()}
        self._silent: Set[int] = frozenset()
        # To look takes a file or two, also when there are no more to be had.
        self._spare = _spare_files()

    def close(self) -> None:
        """Let go of what it holds."""
        for file in self._spare:
            os.close(file)
        self._spare = []

    def look(self) -> None:
        """Look at the connections once, and close those that are too many."""
        self.close()
        try:
            # Below it no address can have too many.
            if sum(1 for _ in _FILES.iterdir()) > min(self._most_each.values()):
                self._close_some(list(_connections(self._most_each.keys())))
            else:
                self._silent = frozenset()
        finally:
            self._spare = _spare_files()

    def _close_some(self, found: list[_Connection]) -> None:
        of_port = Counter(each.port for each in found)
        closed = [  # silent for two looks by now, at a port that may fill up
            each
            for each in found
            if each.received < _FIRST_WORDS_BYTES
            and each.socket in self._silent
            and of_port[each.port] > self._most_each[each.port]
        ]
        self._silent = frozenset(
            each.socket for each in found if each.received < _FIRST_WORDS_BYTES
        )
        left = sorted(set(found) - set(closed), key=lambda each: -each.idle_ms)
        taken = Counter((each.port, each.peer) for each in left)
        for each in left:
            if taken[each.port, each.peer] > self._most_each[each.port]:
                taken[each.port, each.peer] -= 1
                closed.append(each)
        for port, most in self._limits.items():  # some room is kept for who comes
            at_port = [each for each in left if each.port == port and each not in closed]
            of_peer = Counter(each.peer for each in at_port)
            for _ in range(len(at_port) - int(most * _KEPT_SHARE)):
                ((worst, _),) = of_peer.most_common(1)
                idlest = next(each for each in at_port if each.peer == worst)
                at_port.remove(idlest)
                of_peer[worst] -= 1
                closed.append(idlest)
        for each in closed:
            _shut_down(each)
        if closed:
            ((port, worst), _), *_ = Counter((e.port, e.peer) for e in closed).most_common(1)
            _log.warning(
                "connections_closed", connections=len(closed), of=len(found), port=port, peer=worst
            )


def _spare_files() -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # there are none to be had now
        while len(found) < _SPARE:
            found.append(os.open(os.devnull, os.O_RDONLY))
    return found


def _connections(ports: Collection[int]) -> Iterator[_Connection]:
    """Find the connections to some ports of this process."""
    for entry in _FILES.iterdir():
        with suppress(OSError, struct.error):  # closed in between, or no connection
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with _duplicate(int(entry.name)) as found:
                if found.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                port = found.getsockname()[1]
                if port in ports:
                    host, peer_port, *_ = found.getpeername()
                    endpoint = (plain_address(host), str(peer_port))
                    info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
                    inode = os.fstat(found.fileno()).st_ino
                    yield _Connection(
                        *(int(entry.name), inode, port, network_of(host), endpoint),
                        *_TCP_INFO.unpack(info),
                    )


def received_bytes(ports: Collection[int]) -> dict[Endpoint, int]:
    """Return the bytes that have come on each connection to some ports of this process.

    Args:
        ports: As above.
    """
    if not _FILES.is_dir():
        return {}
    return {each.endpoint: each.received for each in _connections(ports)}


def _shut_down(connection: _Connection) -> None:
    """End a connection, unless its file has become another one."""
    with suppress(OSError), _duplicate(connection.file) as found:
        if os.fstat(found.fileno()).st_ino == connection.socket:
            found.shutdown(socket.SHUT_RDWR)


def _duplicate(file: int) -> socket.socket:
    """Take hold of an open socket, so that its number stays what it is.

    Raises:
        OSError: It is no socket, or closed.
    """
    own = os.dup(file)
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise
