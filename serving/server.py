"""The server's life: load, listen, serve, drain, stop.

Models are loaded before the port is taken, so whoever can connect gets answers. On the way out
readiness goes off first, so that balancers look elsewhere while requests are still taken; only
then are new ones refused and the running ones waited for.
"""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from kan_bundle.errors import IntegrityError
from kan_bundle.layout import BundleFolder, find_bundles
from kan_bundle.manifest import Manifest
from serving import health, metrics, reflection, runtime
from serving.control import Keeper, polling
from serving.dispatch import Dispatcher
from serving.engine import Engine
from serving.errors import ModelNotFound, StartupError
from serving.loading import LoadedModel, load_bundle
from serving.policy import parse_policy
from serving.repository import Repository
from serving.rpc import CountingPool, RpcHandlers
from serving.service import SERVICE, InferenceService, fitting_message_bytes, fitting_rows
from serving.settings import Settings

_LOOK_S = 0.05

_log = structlog.get_logger()


class Readiness:
    """Whether requests can be sent: some version is served, and the server is not on its way out.

    Args:
        repository: What is served.
        service: Tells balancers.
    """

    def __init__(self, repository: Repository, service: health.HealthService) -> None:
        self._repository = repository
        self._service = service
        self._draining = False
        self._lock = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether they can."""
        return bool(self._repository.served) and not self._draining

    def update(self) -> None:
        """Look again, and tell."""
        with self._lock:
            self._service.set(self.ready)

    def drain(self) -> None:
        """Be ready no more."""
        self._draining = True
        self.update()


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        address: Host and port taken.
        metrics_address: The same, for Prometheus.
        repository: What is served.
    """

    address: str
    metrics_address: str
    repository: Repository
    readiness: Readiness
    _settings: Settings
    _grpc_server: grpc.Server
    _handlers: RpcHandlers
    _health: health.HealthService
    _reflection: reflection.Reflection

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
            ready=self.readiness.ready,
        )

    def drain(self) -> None:
        """Turn readiness and health off; requests are still taken."""
        self.readiness.drain()

    def stop(self, grace_s: float, now: threading.Event) -> None:
        """Take no more requests, give the running ones time to end, and return when they have.

        Args:
            grace_s: How long they have, in seconds.
            now: Once set, they are not waited for any longer.
        """
        self._handlers.close()  # streams would last as long as their clients like
        stopped = self._grpc_server.stop(grace_s)
        self._health.close()
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
    host = _resolve(settings.host)
    with ExitStack() as cleanup:
        repository = Repository()
        health_service = health.HealthService(("", SERVICE))
        cleanup.callback(health_service.shutdown)
        readiness = Readiness(repository, health_service)
        loader = _Loader(settings, runtime.choose_fused(settings.fused, settings.provider))
        policy = parse_policy(settings.version_policy)
        keeper = Keeper(settings.model_repository, repository, policy, loader, readiness.update)
        _load_at_start(settings, keeper)
        if loader.max_message_bytes is None:
            loader.max_message_bytes = fitting_message_bytes(
                [model.manifest for model in repository.served]
            )

        registry = CollectorRegistry()
        registry.register(metrics.ModelCollector(repository))
        counters = metrics.Counters(registry)
        dispatcher = Dispatcher(_slots(settings))
        service = InferenceService(
            repository,
            keeper if settings.model_control == "explicit" else None,
            dispatcher,
            counters,
            provider=settings.provider,
            is_ready=lambda: readiness.ready,
            max_message_bytes=loader.max_message_bytes,
        )
        requests = CountingPool(settings.max_requests, "request")
        handlers = RpcHandlers(
            service, counters, requests, settings.max_streams, dispatcher.seconds
        )
        cleanup.callback(handlers.shutdown)
        reflection_service = reflection.Reflection((SERVICE, health.SERVICE, reflection.SERVICE))
        cleanup.callback(reflection_service.shutdown)
        grpc_server = grpc.server(
            requests,
            handlers=[handlers],
            options=[
                ("grpc.max_receive_message_length", loader.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a port in use is an error, not a port shared
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(health_service, grpc_server)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection_service, grpc_server)
        server = Server(
            _bind(grpc_server, host, settings),
            cleanup.enter_context(metrics.served(registry, host, settings.metrics_port)),
            repository,
            readiness,
            settings,
            grpc_server,
            handlers,
            health_service,
            reflection_service,
        )
        cleanup.callback(server.close)
        if settings.model_control == "poll":
            cleanup.enter_context(polling(keeper, settings.poll_s))
        grpc_server.start()
        yield server


class _Loader:
    """Loads a bundle as the settings say.

    Attributes:
        max_message_bytes: Largest request accepted; None as long as it is not known.
    """

    def __init__(self, settings: Settings, fused: bool) -> None:
        self._settings = settings
        self._fused = fused
        self.max_message_bytes = settings.max_message_bytes

    def __call__(self, folder: BundleFolder) -> LoadedModel:
        limits = self._settings.limits_of(folder.name)
        model = load_bundle(folder, self._make_engine, limits)
        limit = self.max_message_bytes
        if limit is not None and not fitting_rows(model.manifest, limit):
            raise IntegrityError(
                f"{folder.path}: no row fits into a request of {limit} bytes; start again with "
                "another --max-message-bytes"
            )
        return model

    def _make_engine(self, model: bytes, manifest: Manifest, folder: Path) -> Engine:
        settings = self._settings
        return Engine(
            model, manifest, folder, settings.provider, settings.engine_threads, fused=self._fused
        )


def _slots(settings: Settings) -> int:
    """Choose how many runs there may be at a time."""
    if settings.engine_slots is not None:
        return settings.engine_slots
    if settings.provider == "cuda":
        return 1  # runs of one session share a stream and gain nothing from each other
    return max(1, runtime.available_cpus() // settings.engine_threads)


def _load_at_start(settings: Settings, keeper: Keeper) -> None:
    """Serve what is there, before the port is taken.

    Raises:
        StartupError: There is nothing, and nobody will look again.
        LayoutError: The model repository cannot be read.
    """
    if settings.model_control == "explicit":
        try:
            keeper.refresh(settings.load_models)
        except ModelNotFound as error:
            raise StartupError(f"--load-models: {error}") from error
        return
    if settings.model_control == "none" and not find_bundles(settings.model_repository):
        root = settings.model_repository
        raise StartupError(
            f"{root}: no bundle found; expected MODEL/VERSION/ folders, as "
            f"`python -m export model.pt --output {root}` writes them"
        )
    keeper.refresh()


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
