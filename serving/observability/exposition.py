"""The port that Prometheus scrapes, and a browser shows. It knows neither models nor gRPC.

Whoever reaches the port may read, but a web page elsewhere may not read through a browser: it could
have its own name resolve to this machine (DNS rebinding), so only names that are the server's own
are answered; see `is_own_host`. What one client can hold is limited: bytes and seconds of a request
before it is answered, seconds of an answer, and connections.
"""

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from ipaddress import ip_address
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry

from serving.errors import StartupError
from serving.observability.status_page import ReadReport, make_app

_TIME_S = 5.0  # for a request to arrive, and for each part of an answer to be taken
_HEAD_BYTES = 2**14  # of the request line and the headers
_CONNECTIONS = 64
_PAUSE_S = 0.05  # before another connection is accepted where there was no descriptor for one
_HOST = re.compile(r"(?:\[(?P<ipv6>[^\]]*)\]|(?P<name>[^:]*))(?::[0-9]*)?")

_log = structlog.get_logger()


@contextmanager
def served(
    registry: CollectorRegistry,
    read_report: ReadReport,
    host: str,
    port: int,
    names: Collection[str] = (),
) -> Iterator[str]:
    """Answer scrapes over HTTP at /metrics, and people at /, in threads of their own.

    Args:
        registry: What is told.
        read_report: Gives models' reports.
        host: Numeric address to listen on.
        port: 0 takes a free one.
        names: What the server is called, beside localhost and this machine's name, short and
            fully qualified.

    Yields:
        Host and port taken.

    Raises:
        StartupError: The port cannot be had.
    """
    kind = _IPv6Server if ":" in host else _Server
    try:
        server = kind((host, port), _Handler)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port} for metrics: {error.strerror or error}; choose "
            "another --metrics-port (0 takes a free one) or --host"
        ) from error
    own = {_canonical(name) for name in (*names, "localhost", socket.gethostname())} - {""}

    def is_own(host: str | None) -> bool:
        return is_own_host(host, own) or is_own_host(host, _qualified_names())

    server.set_app(make_app(registry, read_report, is_own))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"{shown}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_own_host(host: str | None, names: Collection[str]) -> bool:
    """Whether a request that came with this Host is meant for this server.

    An IP address always is: a page that has one for its origin was loaded from that address. So is
    a request without Host, which no browser sends.

    Args:
        host: What stands there, with or without a port.
        names: Of the server, in lower case and without a final dot.
    """
    if host is None:
        return True
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    if found["ipv6"] is not None:
        return _is_address(found["ipv6"])
    name = _canonical(found["name"])
    return name in names or _is_address(name)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _canonical(name: str) -> str:
    """Write a host's name in lower case, and without the final dot of a fully qualified one."""
    return name.lower().removesuffix(".")


@cache
def _qualified_names() -> frozenset[str]:
    """List this machine's fully qualified name. The first call may wait for the name service.

    No web page decides it: the lookup starts from the machine's own name.
    """
    return frozenset({_canonical(socket.getfqdn())} - {""})


class _Handler(WSGIRequestHandler):
    timeout = _TIME_S  # of an answer; see `_read_head` for the request

    def handle(self) -> None:
        """Answer one request, once it has arrived."""
        self.rfile.close()
        try:
            self.rfile = BytesIO(_read_head(self.connection))
        except TimeoutError:
            self.wfile.write(b"HTTP/1.0 408 Request Timeout\r\n\r\n")
        except _TooLarge:
            self.wfile.write(b"HTTP/1.0 431 Request Header Fields Too Large\r\n\r\n")
        else:
            self.connection.settimeout(_TIME_S)
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: scrapes come every few seconds."""


class _TooLarge(Exception):
    """A request line and headers of more than _HEAD_BYTES."""


def _read_head(connection: socket.socket) -> bytes:
    """Read a request up to the line that ends its headers, or until the client has no more.

    Raises:
        TimeoutError: It has not arrived in time, however many bytes of it have.
        _TooLarge: It is too large.
    """
    end, head = time.monotonic() + _TIME_S, b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head:
        connection.settimeout(max(end - time.monotonic(), 1e-3))
        content = connection.recv(_HEAD_BYTES)
        if not content:
            break
        head += content
        if len(head) > _HEAD_BYTES:
            raise _TooLarge
        if time.monotonic() > end:
            raise TimeoutError
    return head


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = _CONNECTIONS

    def __init__(self, *arguments: Any) -> None:
        self._open: dict[socket.socket, str] = {}  # with the client's address, the oldest first
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def server_bind(self) -> None:
        """Take the port; wsgiref would ask the name service for the host's name first."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "", self.server_address[1]
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Without a descriptor for it, this would be tried without a pause."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_PAUSE_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, and end another if there are too many.

        The one that ends is the oldest of the client with most: a scrape takes milliseconds, and
        who opens many connections ends its own.
        """
        with self._lock:
            if len(self._open) >= _CONNECTIONS:
                ((busiest, _),) = Counter(self._open.values()).most_common(1)
                oldest = next(one for one, client in self._open.items() if client == busiest)
                del self._open[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread sees the end, and closes it
            self._open[request] = client_address[0]
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what broke a connection, such as a scraper that went away, as all else is logged."""
        _log.debug("scrape_failed", exc_info=True)


class _IPv6Server(_Server):
    address_family = socket.AF_INET6
