"""Several workers as one server: its ports, its metrics and its life."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from serving import addresses
from serving.models.lifecycle import refreshing
from serving.observability import exposition
from serving.runtime import available_cpus
from serving.settings import Settings
from serving.supervisor.supervisor import WorkerSupervisor

_log = structlog.get_logger()


@dataclass(frozen=True)
class MultiprocessServer:
    """All workers, as one server; see `Server`."""

    supervisor: WorkerSupervisor
    address: str
    metrics_address: str
    health_address: str

    @property
    def ready(self) -> bool:
        """Whether every worker that takes connections is ready."""
        return self.supervisor.ready

    def drain(self) -> None:
        """Turn readiness and health off; requests are still taken."""
        self.supervisor.drain()

    def stop(self, grace_s: float, now: Callable[[], bool]) -> None:
        """Take no more requests, and return when no worker is left; see `WorkerSupervisor.stop`."""
        self.supervisor.stop(grace_s, now)


@contextmanager
def supervising(settings: Settings) -> Iterator[MultiprocessServer]:
    """Run a server of several processes; at the end it is stopped at once.

    Raises:
        StartupError: It cannot serve what it was asked to, or not there.
    """
    address = addresses.resolve(settings.host)
    cpus = available_cpus()
    if settings.processes > cpus:
        remedy = "--workers of at most as many, or more CPUs"
        _log.warning("workers_beyond_cpus", workers=settings.processes, cpus=cpus, remedy=remedy)
    with ExitStack() as cleanup:
        ports = {
            use: cleanup.enter_context(addresses.held_port(settings.host, address, port, use))
            for use, port in (("grpc", settings.grpc_port), ("health", settings.health_port))
            if port is not None
        }
        taken = {f"{use}_port": port for use, port in ports.items()}
        own = settings.model_copy(update={**taken, "address_file": None})
        registry = CollectorRegistry()
        deaths = Counter(
            "kanserve_worker_deaths", "Workers that ended by themselves.", registry=registry
        )
        supervisor = WorkerSupervisor(own, deaths)
        workers = Gauge("kanserve_workers", "Workers that take connections.", registry=registry)
        workers.set_function(lambda: len(supervisor.listening))
        registry.register(supervisor)
        hosts = (settings.host, *settings.metrics_hosts)
        metrics_address = cleanup.enter_context(
            exposition.served(registry, supervisor.report, address, settings.metrics_port, hosts)
        )
        cleanup.callback(addresses.withdraw, settings)
        cleanup.callback(supervisor.stop, 0, lambda: True)
        supervisor.start()
        cleanup.enter_context(
            refreshing(supervisor.lifecycle, settings.model_control, settings.poll_s)
        )
        at = {use: addresses.joined(address, port) for use, port in ports.items()}
        yield MultiprocessServer(supervisor, at["grpc"], metrics_address, at.get("health", ""))
