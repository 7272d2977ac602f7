"""The server's life: load, listen, serve, drain, stop.

Models are loaded before the port is taken, so whoever can connect gets answers. On the way out
readiness goes off first, so that balancers look elsewhere while requests are still taken; only
then are new ones refused and the running ones waited for.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import grpc
import structlog
from prometheus_client import CollectorRegistry, ProcessCollector

from kan_bundle.errors import IntegrityError
from kan_bundle.manifest import Manifest
from kan_bundle.signature import read_public_key
from serving import addresses, health, messages, pressure, reflection, runtime
from serving.access import Access
from serving.budget import Budget, choose_budget
from serving.callers import Callers
from serving.connections import (
    HEALTH_CONNECTIONS,
    guarding,
    most_connections,
    received_bytes,
)
from serving.dispatch import Dispatcher
from serving.engine import Engine, EngineOptions
from serving.models.description import fitting_message_bytes, fitting_rows
from serving.models.desired_state import PinnedVersion
from serving.models.host import LocalHost
from serving.models.lifecycle import ModelLifecycle, load_at_start, refreshing
from serving.models.loading import Admission, LoadedModel, load_bundle, yield_gil
from serving.models.policy import parse_policy
from serving.models.repository import Repository
from serving.observability import exposition, metrics
from serving.observability.reports import read_report
from serving.observability.telemetry import Telemetry
from serving.observability.tracing import Tracing
from serving.periodic import repeating
from serving.readiness import Readiness
from serving.room import Room, end_late_calls
from serving.rpc import Limits, RpcHandlers, Unknown
from serving.service import SERVICE, InferenceService, ModelControl
from serving.settings import Settings, is_own
from serving.tls import server_credentials
from serving.transport import threads, trial
from serving.transport.completion_queue import CompletionQueueTransport
from serving.transport.unary import UnaryMethod

_log = structlog.get_logger()

_SWITCH_S = 5e-4  # for whoever measures memory, beside a thread that takes calls without a pause
_LOOK_S = 0.05
_CUT_OFF_S = 5.0  # for calls that are cut off to end, which takes milliseconds
_STALL_LOOK_S = 1.0
_SIGN_OF_LIFE_S = 20.0
_FIRST_WORDS_S = 10.0  # for TLS, and for what HTTP/2 begins with
_IDLE_HEALTH_S = 60.0  # for a connection to the port of health without a call or a watch
_PROBE_BYTES = 64 * 2**20  # of messages that callers who need not be known may be sending
_MOST_PROBES = 256  # calls of theirs at a time
_FEWEST_PROBES = 2  # sending, which is enough, as a probe's message comes with its headers
_FEWEST_PROBES_IN_THREADS = 64  # which take longer to find it there


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        address: Host and port taken.
        metrics_address: The same, for Prometheus; empty in a worker, which is asked otherwise.
        health_address: The same, for health alone; empty if that has no port of its own.
        repository: What is served.
        max_message_bytes: Largest request accepted.
        registry: What there is to be scraped.
        readiness: Whether it is ready.
        rooms: Where calls are, by what they are for.
        budget: Counts the bytes of their messages and answers.
    """

    address: str
    metrics_address: str
    health_address: str
    repository: Repository
    max_message_bytes: int
    registry: CollectorRegistry
    readiness: Readiness
    rooms: Mapping[str, Room]
    budget: Budget
    _settings: Settings
    _grpc_server: grpc.Server
    _handlers: RpcHandlers
    _health: health.Health
    _reflection: reflection.ReflectionHandlers
    _dispatcher: Dispatcher
    _transport: CompletionQueueTransport | None

    @property
    def is_stalled(self) -> bool:
        """Whether requests wait and nothing is run, or none are taken."""
        is_dead = self._transport is not None and self._transport.is_dead
        return is_dead or self._dispatcher.is_stalled

    @property
    def ready(self) -> bool:
        """Whether it is ready."""
        return self.readiness.ready

    def drain(self) -> None:
        """Turn readiness and health off; requests are still taken."""
        self.readiness.drain()

    def stop(self, grace_s: float, now: Callable[[], bool]) -> None:
        """Take no more requests, give the running ones time to end, and return when they have.

        Args:
            grace_s: How long they have, in seconds.
            now: Once true, they are not waited for any longer.
        """
        self._handlers.close()  # streams would last as long as their clients like
        stopped = self._grpc_server.stop(grace_s)
        for room in self.rooms.values():
            room.close()
        self._health.close()
        self._reflection.close()
        while not stopped.wait(_LOOK_S) and not now():
            pass
        self._grpc_server.stop(0)

    def close(self) -> None:
        """Withdraw the address and cut off whatever still runs."""
        addresses.withdraw(self._settings)
        self._grpc_server.stop(0).wait(_CUT_OFF_S)


class Supervised(ModelControl, Protocol):
    """What decides for a worker which models it serves."""

    def attach(self, host: LocalHost) -> int | None:
        """Have models loaded, and wait until this worker may listen.

        Returns:
            The largest message that the other workers accept; None if this one is to choose.
        """


@contextmanager
def running(
    settings: Settings, readiness: Readiness | None = None, supervised: Supervised | None = None
) -> Iterator[Server]:
    """Run a server; at the end it is stopped at once, unless it was stopped before.

    Args:
        settings: Of one worker, if there are several.
        readiness: Of a worker, which agrees with the others.
        supervised: Decides what a worker serves; None in a single process, which decides itself.

    Raises:
        StartupError: It cannot serve what it was asked to, or not there.
        LayoutError: The model repository cannot be read.
        SignatureError: The key whose signature is required cannot be used.
    """
    runtime.prepare(settings.provider)
    sys.setswitchinterval(_SWITCH_S)
    address = addresses.resolve(settings.host)
    access = None if settings.access is None else Access(settings.access)
    with ExitStack() as cleanup:
        repository = Repository()
        readiness = readiness or Readiness()
        status = health.Health(("", SERVICE))
        readiness.watch(status.set)
        counters = metrics.Counters()
        fused = runtime.choose_fused(settings.fused, settings.provider)
        loader = _Loader(settings, fused, counters)
        host = LocalHost(
            repository,
            loader,
            lambda: readiness.serve(bool(repository.served)),
            lambda failure: counters.count_load_failure(transient=failure.transient),
        )
        loader.step = host.step
        if supervised is None:
            root = settings.model_repository
            lifecycle = ModelLifecycle(root, parse_policy(settings.version_policy), host)
            load_at_start(lifecycle, root, settings.model_control, settings.load_models)
            control: ModelControl = lifecycle
            agreed = None
        else:
            control, agreed = supervised, supervised.attach(host)
        if loader.max_message_bytes is None:
            loader.max_message_bytes = agreed or fitting_message_bytes(
                [model.manifest for model in repository.served]
            )

        registry = CollectorRegistry()
        registry.register(metrics.ModelCollector(repository, lambda: readiness.ready))
        registry.register(counters)
        ProcessCollector(registry=registry)  # memory, CPU time, open files
        dispatcher = cleanup.enter_context(Dispatcher(_slots(settings)))
        service = InferenceService(
            repository,
            control if settings.model_control == "explicit" else None,
            dispatcher,
            counters,
            provider=settings.provider,
            is_ready=lambda: readiness.ready,
            max_message_bytes=loader.max_message_bytes,
        )

        def is_full() -> bool:
            # Whose requests they are is not known before they are read.
            for model in repository.served:
                if not model.lane.is_full:
                    return False
            return bool(repository.served)

        if access is not None and settings.tls_cert is None and not is_own(settings.host):
            _log.warning("tokens_in_clear", remedy="--tls-cert and --tls-key, or a proxy with TLS")
        tracing = None
        if settings.otlp_endpoint is not None:
            tracing = Tracing(settings.otlp_endpoint, settings.trace_share)
            cleanup.callback(tracing.close)
        callers = Callers(access, settings.max_metadata_bytes)
        share, patience_s = settings.max_peer_share, settings.receive_timeout_s
        limit = loader.max_message_bytes
        budget = choose_budget(settings.max_inflight_bytes, limit, settings.processes)
        registry.register(metrics.BudgetCollector(budget))
        most_silent = _most_probes(limit)
        probes = Room(_MOST_PROBES, patience_s, most_silent, budget)
        handlers = RpcHandlers(
            service,
            Telemetry(counters, tracing, log_requests=settings.log_requests == "on"),
            callers,
            probes,
            Limits(settings.max_requests, settings.max_streams, limit, share, most_silent),
            budget,
            is_full,
            dispatcher.seconds,
        )
        cleanup.callback(handlers.shutdown)
        names = (SERVICE, health.SERVICE, reflection.SERVICE)
        reflections = reflection.ReflectionHandlers(
            names, callers, share, patience_s, most_silent, counters, budget
        )
        cleanup.callback(reflections.shutdown)
        healths = health.HealthHandlers(status, callers, probes, share, counters)
        at_health_port = Room(_MOST_PROBES, patience_s, budget=budget)
        rooms = {
            **handlers.rooms,
            "reflection": reflections.silent,
            "health port": at_health_port,
        }
        cleanup.enter_context(end_late_calls(rooms.values()))
        several = settings.processes > 1
        most = most_connections(settings.max_connections)
        grpc_server, transport = _server(
            {**handlers.methods, **healths.methods},
            [handlers, reflections, Unknown(counters)],
            _options(settings, limit, most),
            dispatcher if settings.provider == "cpu" else None,  # nobody waits for a device
        )
        health_address = cleanup.enter_context(
            _plain_health(
                health.HealthHandlers(status, callers, at_health_port, share, counters),
                counters,
                address,
                settings,
            )
        )
        server = Server(
            _bind(grpc_server, address, settings),
            ""
            if several
            else cleanup.enter_context(
                exposition.served(
                    registry,
                    partial(read_report, repository),
                    address,
                    settings.metrics_port,
                    (settings.host, *settings.metrics_hosts),
                )
            ),
            health_address,
            repository,
            limit,
            registry,
            readiness,
            rooms,
            budget,
            settings,
            grpc_server,
            handlers,
            status,
            reflections,
            dispatcher,
            transport,
        )
        cleanup.callback(server.close)

        def look_for_stall() -> None:
            readiness.stall(server.is_stalled)
            status.set_live(not server.is_stalled)

        cleanup.enter_context(repeating("stall", look_for_stall, _STALL_LOOK_S))
        ports = {addresses.port_of(each) for each in (server.address, health_address) if each}
        received = partial(received_bytes, ports)
        cleanup.enter_context(pressure.watching(pressure.Watch(budget, rooms.values(), received)))
        limits = {addresses.port_of(server.address): most}
        if health_address:
            limits[addresses.port_of(health_address)] = HEALTH_CONNECTIONS
        cleanup.enter_context(guarding(limits, share))
        if supervised is None:
            cleanup.enter_context(refreshing(lifecycle, settings.model_control, settings.poll_s))
        grpc_server.start()
        if transport is not None:
            transport.start()
        yield server


class _Loader:
    """Loads a bundle as the settings say.

    Attributes:
        max_message_bytes: Largest request accepted; None as long as it is not known.
        step: Called between two steps of a load.
    """

    def __init__(self, settings: Settings, fused: bool, counters: metrics.Counters) -> None:
        self._settings = settings
        self._fused = fused
        self._counters = counters
        self.max_message_bytes = settings.max_message_bytes
        self.step: Callable[[], None] = yield_gil
        key = settings.require_signature
        signer = None if key is None else read_public_key(key)
        self._admission = Admission(settings.max_model_bytes, signer)

    def __call__(self, version: PinnedVersion) -> LoadedModel:
        folder = version.folder
        limits = self._settings.limits_of(folder.name)
        count = partial(self._counters.count_rows, folder.name)
        model = load_bundle(
            folder,
            self._make_engine,
            limits,
            count,
            self._admission,
            digest=version.digest,
            step=self.step,
        )
        limit = self.max_message_bytes
        if limit is not None and not fitting_rows(model.manifest, limit):
            raise IntegrityError(
                f"{folder.path}: no row fits into a request of {limit} bytes; start again with "
                "another --max-message-bytes"
            )
        return model

    def _make_engine(self, model: bytes, manifest: Manifest, folder: Path) -> Engine:
        settings = self._settings
        on_cuda = settings.provider == "cuda"
        graphs = on_cuda and settings.cuda_graphs == "on"
        options = EngineOptions(
            settings.provider,
            settings.engine_threads,
            fused=self._fused,
            tf32=on_cuda and settings.cuda_tf32 == "on",
            graph_rows=settings.limits_of(manifest.name).max_batch_rows if graphs else 0,
        )
        return Engine(model, manifest, folder, options)


def _most_probes(max_message_bytes: int) -> int:
    """Choose how many callers who need not be known may be sending their message at a time.

    gRPC takes a message as large as any may be, before anybody can look what it is for.
    """
    fewest = _FEWEST_PROBES if trial.is_usable() else _FEWEST_PROBES_IN_THREADS
    return min(_MOST_PROBES, max(fewest, _PROBE_BYTES // max_message_bytes))


def _slots(settings: Settings) -> int:
    """Choose how many runs there may be at a time."""
    if settings.engine_slots is not None:
        return settings.engine_slots
    if settings.provider == "cuda":
        return 1  # runs of one session share a stream and gain nothing from each other
    return max(1, runtime.available_cpus() // settings.engine_threads)


def _options(
    settings: Settings, max_message_bytes: int, most_connections: int
) -> list[tuple[str, int]]:
    """Write limits as gRPC takes them."""
    options = {
        "grpc.max_receive_message_length": max_message_bytes,
        **dict([messages.AS_SENT]),
        "grpc.max_send_message_length": -1,
        "grpc.http2.bdp_probe": 0,
        "grpc.max_allowed_incoming_connections": most_connections,
        # Of one process, a port in use is an error, not a port shared.
        "grpc.so_reuseport": int(settings.processes > 1),
        "grpc.max_concurrent_streams": settings.max_connection_calls,
        "grpc.max_metadata_size": settings.max_metadata_bytes,
        "grpc.absolute_max_metadata_size": settings.max_metadata_bytes,
        "grpc.keepalive_time_ms": _ms(settings.keepalive_s),
        "grpc.keepalive_timeout_ms": _ms(_SIGN_OF_LIFE_S),
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": _ms(settings.min_ping_interval_s),
        "grpc.server_handshake_timeout_ms": _ms(_FIRST_WORDS_S),
        "grpc.http2.settings_timeout": _ms(_FIRST_WORDS_S),
    }
    if settings.max_connection_idle_s is not None:
        options["grpc.max_connection_idle_ms"] = _ms(settings.max_connection_idle_s)
    if settings.max_connection_age_s is not None:
        options["grpc.max_connection_age_ms"] = _ms(settings.max_connection_age_s)
        options["grpc.max_connection_age_grace_ms"] = _ms(settings.grace_s)
    return list(options.items())


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _server(
    methods: Mapping[str, UnaryMethod],
    handlers: list[grpc.GenericRpcHandler],
    options: list[tuple[str, int]],
    dispatcher: Dispatcher | None = None,
) -> tuple[grpc.Server, CompletionQueueTransport | None]:
    """Make a server that has calls of one message by a completion queue, or by threads."""
    by_threads = {path: threads.handler(method) for path, method in methods.items()}
    is_usable = trial.is_usable()
    if not is_usable:
        handlers = [threads.ThreadHandlers(by_threads), *handlers]
    pool = ThreadPoolExecutor(1, "other")  # every handler of ours brings its own
    server = grpc.server(pool, handlers=handlers, options=options)
    if not is_usable:
        return server, None
    return server, CompletionQueueTransport(server, methods, by_threads, dispatcher)


@contextmanager
def _plain_health(
    handlers: health.HealthHandlers, counters: metrics.Counters, address: str, settings: Settings
) -> Iterator[str]:
    """Answer health alone at a port without TLS, if there is to be one; give where."""
    if settings.health_port is None:
        yield ""
        return
    server, transport = _server(
        handlers.methods,
        [Unknown(counters)],
        [
            *_options(settings, messages.SMALL_BYTES, HEALTH_CONNECTIONS),
            ("grpc.max_connection_idle_ms", _ms(_IDLE_HEALTH_S)),
        ],
    )
    try:
        port = server.add_insecure_port(addresses.joined(address, settings.health_port))
    except RuntimeError as error:
        raise addresses.cannot_listen(settings.host, settings.health_port, "health") from error
    server.start()
    if transport is not None:
        transport.start()
    try:
        yield addresses.joined(address, port)
    finally:
        server.stop(0).wait(_CUT_OFF_S)


def _bind(grpc_server: grpc.Server, address: str, settings: Settings) -> str:
    """Take the port for gRPC."""
    where = addresses.joined(address, settings.grpc_port)
    try:
        if settings.tls_cert is None or settings.tls_key is None:
            port = grpc_server.add_insecure_port(where)
        else:
            credentials = server_credentials(
                settings.tls_cert, settings.tls_key, settings.tls_client_ca
            )
            port = grpc_server.add_secure_port(where, credentials)
    except RuntimeError as error:
        raise addresses.cannot_listen(settings.host, settings.grpc_port, "grpc") from error
    return addresses.joined(address, port)
