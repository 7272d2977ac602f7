"""Ports for programs that must be told which one to take.

A port that the system draws is free for anybody until it is taken, also for the next who has one
drawn. These lie below those that it draws from, every process of pytest has its own, and none is
given twice.
"""

import os
import socket
from contextlib import suppress

_FIRST, _END = 10_000, 32_768  # from where Linux draws
_COUNT = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_OWN = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Another pytest on this machine very likely begins elsewhere.
_BEGIN = _FIRST + os.getpid() % 10_000 // _COUNT * _COUNT + _OWN

_left = iter(range(_BEGIN, _END, _COUNT))


def free_port() -> int:
    """A port that nobody listens on, and that nobody else is given."""
    for port in _left:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError(f"no port is left between {_BEGIN} and {_END}")
