"""What Prometheus scrapes. This module knows models and their engines, not gRPC."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, Counter, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.errors import StartupError
from serving.repository import Repository

_log = structlog.get_logger()


class Counters:
    """What is counted as it happens.

    Args:
        registry: Where Prometheus finds it.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "kanserve_calls",
            "Calls and messages of streams that have ended, by method and gRPC status code; "
            "those refused before they were read have the method `refused`.",
            ["method", "code"],
            registry=registry,
        )
        self._rows = Counter(
            "kanserve_rows", "Rows that were answered.", ["model"], registry=registry
        )
        self._outside = Counter(
            "kanserve_out_of_grid_rows",
            "Those among them with a feature outside of the grid that the model was trained on, "
            "where its splines are zero.",
            ["model"],
            registry=registry,
        )

    def count_call(self, method: str, code: str) -> None:
        """Count a call by how it ended."""
        self._calls.labels(method, code).inc()

    def count_rows(self, model: str, rows: int, outside: int) -> None:
        """Count the rows of an answer, and those of them outside of the model's grid."""
        self._rows.labels(model).inc(rows)
        self._outside.labels(model).inc(outside)


class ModelCollector(Collector):
    """Describes the models as they are when it is asked.

    Args:
        repository: What is served.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def collect(self) -> Iterator[Metric]:
        """List what Prometheus reads."""
        layers = GaugeMetricFamily(
            "kanserve_model_kan_layers",
            "KANLinear layers of a model version, by the way they run.",
            labels=["model", "version", "execution"],
        )
        states = GaugeMetricFamily(
            "kanserve_model_state",
            "1 for the state that a model version is in: READY, LOADING or UNAVAILABLE.",
            labels=["model", "version", "state", "reason"],
        )
        for name, versions in self._repository.models.items():
            for number, version in versions.items():
                states.add_metric([name, str(number), version.state, version.reason], 1)
                if version.model is not None:
                    fused = version.model.engine.fused_layers
                    standard = len(version.model.manifest.layers) - fused
                    layers.add_metric([name, str(number), "fused"], fused)
                    layers.add_metric([name, str(number), "standard"], standard)
        yield from (layers, states)


@contextmanager
def served(registry: CollectorRegistry, host: str, port: int) -> Iterator[str]:
    """Answer scrapes over HTTP at /metrics, in threads of their own.

    Args:
        registry: What is told.
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
    server.set_app(make_wsgi_app(registry))
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
