"""The server's life: load, listen, serve, drain, stop.

Models are loaded before the port is taken, so whoever can connect gets answers. On the way out
readiness goes off first, so that balancers look elsewhere while requests are still taken; only
then are new ones refused and the running ones waited for.

Requests run in one pool of threads; health, readiness and reflection in others, so that none of
them waits for the rest.
"""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from kan_bundle.layout import BundleFolder
from kan_bundle.manifest import Manifest
from serving import health, metrics, runtime
from serving.engine import Engine
from serving.errors import StartupError
from serving.repository import LoadedModel, ModelVersion, Repository, load_repository
from serving.service import SERVICE, InferenceService, fitting_message_bytes
from serving.settings import Settings

_PROBE_THREADS = 2
_REFLECTION_THREADS = 2
_LOOK_S = 0.05

_log = structlog.get_logger()


class Server:
    """A server that answers.

    Attributes:
        address: Host and port taken.
        metrics_address: The same, for Prometheus.
        repository: What is served.
    """

    def __init__(
        self,
        settings: Settings,
        address: str,
        metrics_address: str,
        repository: Repository,
        grpc_server: grpc.Server,
        health_service: health.HealthService,
        reflection_service: "_Reflection",
        draining: threading.Event,
    ) -> None:
        self.address = address
        self.metrics_address = metrics_address
        self.repository = repository
        self._settings = settings
        self._grpc_server = grpc_server
        self._health = health_service
        self._reflection = reflection_service
        self._draining = draining

    def announce(self) -> None:
        """Log the address and write it to the address file.

        Raises:
            StartupError: The file cannot be written.
        """
        file = self._settings.address_file
        if file is not None:
            try:
                addresses = {"grpc": self.address, "metrics": self.metrics_address}
                _write_whole(file, json.dumps(addresses) + "\n")
            except OSError as error:
                raise StartupError(
                    f"--address-file {file}: cannot be written: {error.strerror}"
                ) from error
        _log.info(
            "listening",
            grpc=self.address,
            metrics=self.metrics_address,
            provider=self._settings.provider,
            ready=self.repository.ready,
        )

    def drain(self) -> None:
        """Turn readiness and health off; requests are still taken."""
        self._draining.set()
        self._health.set(False)

    def stop(self, grace_s: float, now: threading.Event) -> None:
        """Take no more requests, give the running ones time to end, and return when they have.

        Args:
            grace_s: How long they have, in seconds.
            now: Once set, they are not waited for any longer.
        """
        stopped = self._grpc_server.stop(grace_s)
        self._health.close()  # streams that would last as long as their clients like
        self._reflection.close()
        while not stopped.wait(_LOOK_S) and not now.is_set():
            pass  # neither event can be waited for with the other
        self._grpc_server.stop(None)

    def close(self) -> None:
        """Withdraw the address and cut off whatever still runs."""
        file = self._settings.address_file
        if file is not None and file.is_file():
            file.unlink()
        self._grpc_server.stop(None).wait()


@contextmanager
def running(settings: Settings) -> Iterator[Server]:
    """Run a server; at the end it is stopped at once, unless it was stopped before.

    Raises:
        StartupError: It cannot serve what it was asked to, or not there.
        LayoutError: The model repository cannot be read.
    """
    runtime.prepare(settings.provider)
    fused = runtime.choose_fused(settings.fused, settings.provider)

    def make_engine(model: bytes, manifest: Manifest, folder: Path) -> Engine:
        return Engine(
            model, manifest, folder, settings.provider, settings.engine_threads, fused=fused
        )

    repository = load_repository(settings.model_repository, make_engine, _log_version, _log_skipped)
    max_message_bytes = settings.max_message_bytes or fitting_message_bytes(
        [model.manifest for model in repository.loaded]
    )
    host = _resolve(settings.host)
    draining = threading.Event()
    service = InferenceService(
        repository,
        is_ready=lambda: repository.ready and not draining.is_set(),
        max_message_bytes=max_message_bytes,
    )
    requests = ThreadPoolExecutor(settings.rpc_threads, thread_name_prefix="rpc")
    probes = ThreadPoolExecutor(_PROBE_THREADS, thread_name_prefix="probe")
    reflections = ThreadPoolExecutor(_REFLECTION_THREADS, thread_name_prefix="reflection")
    with ExitStack() as cleanup:
        for pool in (requests, probes, reflections):
            cleanup.callback(pool.shutdown, wait=False)
        grpc_server = grpc.server(
            requests,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a port in use is an error, not a port shared
            ],
        )
        grpc_server.add_generic_rpc_handlers((service.handlers(probes),))
        health_service = health.HealthService(("", SERVICE), repository.ready, probes)
        health_pb2_grpc.add_HealthServicer_to_server(health_service, grpc_server)
        reflection_service = _Reflection(
            (SERVICE, health.SERVICE, reflection.SERVICE_NAME), reflections
        )
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection_service, grpc_server)
        server = Server(
            settings,
            _bind(grpc_server, host, settings),
            cleanup.enter_context(
                metrics.served(metrics.model_metrics(repository), host, settings.metrics_port)
            ),
            repository,
            grpc_server,
            health_service,
            reflection_service,
            draining,
        )
        cleanup.callback(server.close)
        grpc_server.start()
        yield server


class _Reflection(reflection.ReflectionServicer):  # type: ignore[misc]
    """Reflection in a pool of its own, whose streams can be ended."""

    def __init__(self, services: tuple[str, ...], pool: Executor) -> None:
        super().__init__(services)
        self._open: set[grpc.ServicerContext] = set()
        self._lock = threading.Lock()
        # gRPC reads the attribute from the handler; see HealthService.
        answer = super().ServerReflectionInfo
        self.ServerReflectionInfo = partial(self._tracked, answer)
        self.ServerReflectionInfo.experimental_thread_pool = pool  # type: ignore[attr-defined]

    def close(self) -> None:
        with self._lock:
            for context in self._open:
                context.cancel()

    def _tracked(self, answer: Any, requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with self._lock:
            self._open.add(context)
        try:
            yield from answer(requests, context)
        finally:
            with self._lock:
                self._open.discard(context)


def _resolve(host: str) -> str:
    """Find the one address that a host stands for: IPv4 if there are both, as for localhost."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(f"--host {host}: no address of that name: {error.strerror}") from error
    addresses = sorted(info[4][0] for info in found if isinstance(info[4][0], str))
    return min(addresses, key=lambda address: ":" in address)


def _bind(grpc_server: grpc.Server, address: str, settings: Settings) -> str:
    """Take the port for gRPC."""
    host = f"[{address}]" if ":" in address else address
    try:
        return f"{host}:{grpc_server.add_insecure_port(f'{host}:{settings.grpc_port}')}"
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {settings.host}:{settings.grpc_port}: the port is taken or the "
            "address is not this machine's; choose another --grpc-port (0 takes a free one) or "
            "--host"
        ) from error


def _write_whole(file: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing; a pipe or a device is written to."""
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    partial_file = file.with_name(f".{file.name}.partial")
    try:
        partial_file.write_text(text, encoding="utf-8")
        partial_file.replace(file)
    finally:
        partial_file.unlink(missing_ok=True)


def _log_version(folder: BundleFolder, outcome: ModelVersion) -> None:
    log = _log.bind(model=folder.name, version=folder.version)
    if isinstance(outcome, LoadedModel):
        log.info(
            "model_ready",
            source_sha256=outcome.manifest.source and outcome.manifest.source.sha256,
            kan_layers=len(outcome.manifest.layers),
            fused_layers=outcome.engine.fused_layers,
        )
    else:
        log.error("model_refused", reason=outcome.reason)


def _log_skipped(path: Path, reason: str) -> None:
    _log.warning("folder_skipped", path=str(path), reason=reason)
