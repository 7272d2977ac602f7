"""The port that Prometheus scrapes, and a browser shows. It knows neither models nor gRPC."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry

from serving.errors import StartupError
from serving.observability.status_page import ReadReport, make_app

_log = structlog.get_logger()


@contextmanager
def served(
    registry: CollectorRegistry, read_report: ReadReport, host: str, port: int
) -> Iterator[str]:
    """Answer scrapes over HTTP at /metrics, and people at /, in threads of their own.

    Args:
        registry: What is told.
        read_report: Gives models' reports.
        host: Numeric address to listen on.
        port: 0 takes a free one.

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
    server.set_app(make_app(registry, read_report))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"{shown}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(WSGIRequestHandler):
    timeout = 5  # seconds; whoever says nothing for so long holds a thread no longer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: scrapes come every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Take the port; wsgiref would ask the name service for the host's name first."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "", self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what broke a connection, such as a scraper that went away, as all else is logged."""
        _log.debug("scrape_failed", exc_info=True)


class _IPv6Server(_Server):
    address_family = socket.AF_INET6
