"""Several workers as one server: its ports, its metrics and its life."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serving import addresses
from serving.models.lifecycle import refreshing
from serving.observability import exposition
from serving.runtime import available_cpus
from serving.settings import Settings
from serving.supervisor.supervisor import WorkerSupervisor

_log = structlog.get_logger()


class _Collector(Collector):
    """The metrics of all workers, each under its number."""

    def __init__(self, supervisor: WorkerSupervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for index, text in self._supervisor.scrape().items():
            for family in text_string_to_metric_families(text):
                own = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "worker": str(index)}
                    own.samples.append(sample._replace(labels=labels))
        yield from families.values()

    def describe(self) -> Iterator[Metric]:
        """List nothing before workers run."""
        return iter(())


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
    if settings.workers > cpus:
        _log.warning(
            "workers_beyond_cpus",
            workers=settings.workers,
            cpus=cpus,
            remedy="--workers of at most as many, or more CPUs",
        )
    with ExitStack() as cleanup:
        port = cleanup.enter_context(
            addresses.held_port(settings.host, address, settings.grpc_port, "grpc")
        )
        health_port = None
        if settings.health_port is not None:
            health_port = cleanup.enter_context(
                addresses.held_port(settings.host, address, settings.health_port, "health")
            )
        registry = CollectorRegistry()
        deaths = Counter(
            "kanserve_worker_deaths", "Workers that ended by themselves.", registry=registry
        )
        own = settings.model_copy(
            update={"grpc_port": port, "health_port": health_port, "address_file": None}
        )
        supervisor = WorkerSupervisor(own, deaths)
        Gauge("kanserve_workers", "Workers that take connections.", registry=registry).set_function(
            lambda: supervisor.listening
        )
        registry.register(_Collector(supervisor))
        metrics_address = cleanup.enter_context(
            exposition.served(
                registry,
                supervisor.report,
                address,
                settings.metrics_port,
                (settings.host, *settings.metrics_hosts),
            )
        )
        cleanup.callback(addresses.withdraw, settings)
        cleanup.callback(supervisor.close)
        supervisor.start()
        cleanup.enter_context(
            refreshing(supervisor.lifecycle, settings.model_control, settings.poll_s)
        )
        health_address = "" if health_port is None else addresses.joined(address, health_port)
        yield MultiprocessServer(
            supervisor,
            addresses.joined(address, port),
            metrics_address,
            health_address,
        )
