"""Several processes on one port, as their keeper sees them; worker.py is one of them.

The keeper holds the port, starts the workers, and starts another where one has died. Each worker is
a whole server. They are ready together or not at all; what a client has loaded in one is loaded in
all; and one endpoint tells the metrics of each, by the label `worker`. The keeper imports neither
gRPC nor onnxruntime, and workers are started afresh, because neither survives a fork.
"""

import multiprocessing
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serving import addresses
from serving.errors import ControlRefused, EngineError, StartupError
from serving.observability import exposition
from serving.peers import Gone, Peer
from serving.settings import Settings
from serving.worker import work

_SCRAPE_S = 2.0  # Prometheus waits 10
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_SOUND_S = 60.0  # who lives for so long was not ill from the start
_LOOK_S = 0.05

_log = structlog.get_logger()


class Workers:
    """Processes that serve on one port, from the first to the last. The life of a `Server`.

    Args:
        settings: Of each of them; the port is one that is held for them.
        deaths: Counts those that end by themselves.
    """

    def __init__(self, settings: Settings, deaths: Counter) -> None:
        self._settings = settings
        self._deaths = deaths
        self._lock = threading.Lock()
        self._peers: dict[int, Peer] = {}
        self._able = dict.fromkeys(range(settings.workers), False)
        self._loaded = dict.fromkeys(settings.load_models)
        self._listening: list[Future[None]] = [Future() for _ in self._able]
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, args=(i,), name=f"keep-{i}") for i in self._able
        ]

    def start(self) -> None:
        """Start all, and return when all of them listen.

        Raises:
            StartupError: One refuses; the message is its.
        """
        for thread in self._threads:
            thread.start()
        done, _ = wait(self._listening, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()

    @property
    def ready(self) -> bool:
        """Whether all are ready."""
        return all(self._able.values())

    def drain(self) -> None:
        """Turn readiness and health off in all of them; requests are still taken."""
        self._ending.set()
        wait(self._ask_all("drain"), _SCRAPE_S)

    def stop(self, grace_s: float, now: Callable[[], bool]) -> None:
        """Take no more requests, give the running ones time to end, and return when they have.

        Args:
            grace_s: How long they have, in seconds.
            now: Once true, they are not waited for any longer.
        """
        self._ending.set()
        self._ask_all("stop", grace_s)
        told = False
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_LOOK_S)
                if now() and not told:
                    self._ask_all("stop_now")
                    told = True

    def close(self) -> None:
        """Have no worker left."""
        self.stop(0, lambda: True)

    def scrape(self) -> dict[int, str]:
        """Ask every worker for its metrics, in Prometheus's words."""
        with self._lock:
            asked = {index: peer.ask("metrics") for index, peer in self._peers.items()}
        wait(asked.values(), _SCRAPE_S)
        return {
            index: future.result()
            for index, future in asked.items()
            if future.done() and future.exception() is None
        }

    def report(self, name: str, version: str) -> bytes:
        """Ask one worker after the other for the report of a version.

        Raises:
            ModelNotFound: One says that there is none.
            ControlRefused: One says that it cannot be had, or none answers.
        """
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            with suppress(Gone, EngineError, TimeoutError):
                return b64decode(peer.ask("report", [name, version]).result(_SCRAPE_S))
        raise ControlRefused("no worker answers; the server's log says more")

    def _ask_all(self, what: str, argument: Any = None) -> list["Future[Any]"]:
        with self._lock:
            return [peer.ask(what, argument) for peer in self._peers.values()]

    def _keep(self, index: int) -> None:
        """Have one worker, and another when it dies."""
        pause_s = _FIRST_PAUSE_S
        while not self._ending.is_set():
            started = time.monotonic()
            code = self._run(index)
            if time.monotonic() - started > _SOUND_S:
                pause_s = _FIRST_PAUSE_S
            listening = self._listening[index]
            if not listening.done():
                refusal = StartupError(f"worker {index} ended with code {code} at its start")
                listening.set_exception(refusal)
            if listening.exception() is not None or self._ending.is_set():
                return
            self._deaths.inc()
            _log.error("worker_died", worker=index, code=code, again_in_s=pause_s)
            self._ending.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _run(self, index: int) -> int | None:
        """Run a process from its start to its end.

        Returns:
            Its exit code; negative for a signal.
        """
        spawn = multiprocessing.get_context("spawn")
        ours, its = spawn.Pipe()
        with ours:
            settings = self._settings.model_copy(update={"load_models": tuple(self._loaded)})
            process = spawn.Process(target=work, args=(settings, index, its), daemon=True)
            process.start()
            its.close()
            _log.info("worker_started", worker=index, pid=process.pid)
            peer = Peer(ours, *self._answers(index))
            with self._lock:
                self._peers[index] = peer
            if self._ending.is_set():  # too late to be told
                process.kill()
            peer.serve()
            process.join()
        with self._lock:
            del self._peers[index]
        self._set_able(index, True)  # the system sends nobody there until another one listens
        return process.exitcode

    def _answers(
        self, index: int
    ) -> tuple[dict[str, Callable[[Any], Any]], dict[str, Callable[[Any], Any]]]:
        """List what a worker may ask for."""
        listening = self._listening[index]

        def listens(_: None) -> None:
            if not listening.done():
                listening.set_result(None)

        def refused(reason: str) -> None:
            if listening.done():
                _log.error("worker_refused", worker=index, reason=reason)
            else:
                listening.set_exception(StartupError(reason))

        answers: dict[str, Callable[[Any], Any]] = {
            "able": lambda able: self._set_able(index, able),
            "listening": listens,
            "refused": refused,
        }
        return answers, {"load": self._load, "unload": self._unload}

    def _set_able(self, index: int, able: bool) -> None:
        with self._lock:
            self._able[index] = able
            for peer in self._peers.values():
                peer.ask("ready", self.ready)

    def _load(self, name: str) -> None:
        self._in_all("load", name)
        self._loaded[name] = None

    def _unload(self, name: str) -> None:
        self._loaded.pop(name, None)
        self._in_all("unload", name)

    def _in_all(self, what: str, name: str) -> None:
        """Have all workers do something; raise what the first one raises that fails."""
        for future in self._ask_all(what, name):
            with suppress(Gone):  # the next one starts with what is loaded
                future.result()


class _Collector(Collector):
    """The metrics of all workers, each under its number."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for index, text in self._workers.scrape().items():
            for family in text_string_to_metric_families(text):
                own = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "worker": str(index)}
                    own.samples.append(sample._replace(labels=labels))
        yield from families.values()

    def describe(self) -> Iterator[Metric]:
        """Say nothing of it beforehand: there is nobody to ask yet."""
        return iter(())


class KeptServer:
    """All workers, as one server.

    Args:
        settings: Of the server.
        workers: They serve.
        address: Host and port taken.
        metrics_address: The same, for Prometheus.
        health_address: The same, for health alone; empty if that has no port of its own.
    """

    def __init__(
        self,
        settings: Settings,
        workers: Workers,
        address: str,
        metrics_address: str,
        health_address: str,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self.address = address
        self.metrics_address = metrics_address
        self.health_address = health_address
        self.drain = workers.drain
        self.stop = workers.stop

    def announce(self) -> None:
        """Log the address and write it to the address file.

        Raises:
            StartupError: The file cannot be written.
        """
        addresses.announce(
            self._settings,
            grpc=self.address,
            metrics=self.metrics_address,
            health=self.health_address,
            ready=self._workers.ready,
            workers=self._settings.workers,
        )


@contextmanager
def keeping(settings: Settings) -> Iterator[KeptServer]:
    """Run a server of several processes; at the end it is stopped at once.

    Raises:
        StartupError: It cannot serve what it was asked to, or not there.
    """
    address = addresses.resolve(settings.host)
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
        workers = Workers(own, deaths)
        registry.register(_Collector(workers))
        metrics_address = cleanup.enter_context(
            exposition.served(
                registry,
                workers.report,
                address,
                settings.metrics_port,
                (settings.host, *settings.metrics_hosts),
            )
        )
        cleanup.callback(addresses.withdraw, settings)
        cleanup.callback(workers.close)
        workers.start()
        yield KeptServer(
            settings,
            workers,
            addresses.joined(address, port),
            metrics_address,
            "" if health_port is None else addresses.joined(address, health_port),
        )
