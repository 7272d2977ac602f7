"""The server's life: load, listen, serve, drain, stop.

Models are loaded before the port answers, so whoever can connect gets answers. On the way out
readiness goes off first, so that balancers look elsewhere while requests are still taken; only
then are new ones refused and the running ones waited for.
"""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kan_bundle.layout import BundleFolder
from kan_bundle.manifest import Manifest
from protos import inference_pb2, inference_pb2_grpc
from serving.engine import Engine, prepare_runtime
from serving.errors import StartupError
from serving.repository import LoadedModel, ModelVersion, Repository, load_repository
from serving.service import InferenceService
from serving.settings import Settings

_HEALTH_WATCHERS = 16
SERVICE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

_log = structlog.get_logger()


class Server:
    """A server that answers.

    Attributes:
        address: Host and port taken.
        repository: What is served.
    """

    def __init__(
        self,
        settings: Settings,
        address: str,
        repository: Repository,
        grpc_server: grpc.Server,
        health_servicer: health.HealthServicer,
        draining: threading.Event,
    ) -> None:
        self.address = address
        self.repository = repository
        self._settings = settings
        self._grpc_server = grpc_server
        self._health = health_servicer
        self._draining = draining

    def announce(self) -> None:
        """Log the address and write it to the address file, of which a reader sees all or nothing.

        Raises:
            OSError: The file cannot be written.
        """
        file = self._settings.address_file
        if file is not None:
            partial = file.with_name(f".{file.name}.partial")
            partial.write_text(json.dumps({"grpc": self.address}) + "\n", encoding="utf-8")
            partial.replace(file)
        _log.info(
            "listening",
            grpc=self.address,
            provider=self._settings.provider,
            ready=self.repository.ready,
        )

    def drain(self) -> None:
        """Turn readiness and health off; requests are still taken."""
        self._draining.set()
        self._health.enter_graceful_shutdown()

    def stop(self, grace_s: float) -> None:
        """Take no more requests, give the running ones `grace_s` seconds, and return when done."""
        self._grpc_server.stop(grace_s).wait()


@contextmanager
def running(settings: Settings) -> Iterator[Server]:
    """Run a server; at the end it is stopped at once, unless it was stopped before.

    Raises:
        StartupError: It cannot serve what it was asked to, or not there.
        LayoutError: The model repository cannot be read.
    """
    prepare_runtime(settings.provider)
    grpc_server = grpc.server(
        ThreadPoolExecutor(settings.rpc_threads, thread_name_prefix="rpc"),
        options=[
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port in use is an error, not a port shared
        ],
    )
    address = _bind(grpc_server, settings)

    def make_engine(model: bytes, manifest: Manifest) -> Engine:
        return Engine(model, manifest, settings.provider, settings.engine_threads)

    repository = load_repository(settings.model_repository, make_engine, _log_version)
    draining = threading.Event()
    service = InferenceService(
        repository,
        is_ready=lambda: repository.ready and not draining.is_set(),
        max_message_bytes=settings.max_message_bytes,
    )
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, grpc_server)
    health_servicer = _add_health(grpc_server, repository.ready)
    reflection.enable_server_reflection(
        (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), grpc_server
    )

    grpc_server.start()
    try:
        yield Server(settings, address, repository, grpc_server, health_servicer, draining)
    finally:
        grpc_server.stop(None).wait()


def _bind(grpc_server: grpc.Server, settings: Settings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    wanted = f"{host}:{settings.grpc_port}"
    try:
        port = grpc_server.add_insecure_port(wanted)
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {wanted}: the port is taken or the address is not this machine's; "
            "choose another --grpc-port (0 takes a free one) or --host"
        ) from error
    return f"{host}:{port}"


def _add_health(grpc_server: grpc.Server, ready: bool) -> health.HealthServicer:
    """Offer grpc.health.v1; the empty service name stands for the server's readiness."""
    # A watcher would otherwise hold one of the threads that requests need.
    servicer = health.HealthServicer(
        experimental_non_blocking=True,
        experimental_thread_pool=ThreadPoolExecutor(_HEALTH_WATCHERS, thread_name_prefix="watch"),
    )
    status = health_pb2.HealthCheckResponse
    for name in (health.OVERALL_HEALTH, SERVICE):
        servicer.set(name, status.SERVING if ready else status.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, grpc_server)
    return servicer


def _log_version(folder: BundleFolder, outcome: ModelVersion) -> None:
    log = _log.bind(model=folder.name, version=folder.version)
    if isinstance(outcome, LoadedModel):
        log.info("model_ready", source_sha256=outcome.manifest.source.sha256)
    else:
        log.error("model_refused", reason=outcome.reason)
