"""What Prometheus scrapes. This module knows models and their engines, not gRPC."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from serving.errors import StartupError
from serving.repository import Repository


def model_metrics(repository: Repository) -> CollectorRegistry:
    """Describe the models that can be served."""
    registry = CollectorRegistry()
    layers = Gauge(
        "kanserve_model_kan_layers",
        "KANLinear layers of a model version, by the way they run.",
        ["model", "version", "execution"],
        registry=registry,
    )
    for model in repository.loaded:
        manifest, fused = model.manifest, model.engine.fused_layers
        for execution, count in (("fused", fused), ("standard", len(manifest.layers) - fused)):
            layers.labels(manifest.name, str(manifest.version), execution).set(count)
    return registry


@contextmanager
def served(registry: CollectorRegistry, host: str, port: int) -> Iterator[str]:
    """Answer scrapes over HTTP at /metrics, in a thread of its own.

    Args:
        registry: What is told.
        host: Address to listen on.
        port: 0 takes a free one.

    Yields:
        Host and port taken.

    Raises:
        StartupError: The port cannot be had.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port} for metrics: {error.strerror or error}; choose "
            "another --metrics-port (0 takes a free one) or --host"
        ) from error
    try:
        yield f"[{host}]:{server.server_port}" if ":" in host else f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
