"""Worker processes on one port: started, watched, replaced, and kept at one desired state.

`ModelLifecycle` decides what is served, and holds this desired state in one place. Every change
goes to all workers in the same order: first all load, then all change over. A worker that starts
gets the whole desired state, and listens once it serves it, so it is neither ahead of its siblings
nor behind. A worker whose heartbeats stop is killed and replaced.

No well-kept library does this. gunicorn's arbiter has heartbeats, timeouts and restarts, but it
forks, which gRPC survives only with care; it knows no state that workers must agree on, and its
workers are ready when they run. prometheus_client's multiprocess mode takes neither collectors nor
gauges of live state. The supervisor imports neither gRPC nor onnxruntime, and forks nothing itself:
it has threads, and gRPC and onnxruntime survive a fork only unused (preload.py).
"""

import errno
import os
import socket
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import structlog
from prometheus_client import Counter
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from kan_bundle.errors import BundleError
from serving.errors import ControlRefused, EngineError, StartupError
from serving.models.desired_state import LoadFailure, PinnedVersion, Plans
from serving.models.lifecycle import ModelLifecycle, load_at_start
from serving.models.policy import parse_policy
from serving.settings import Settings
from serving.supervisor.connection import PeerDisconnected, RpcConnection
from serving.supervisor.worker import work

_SCRAPE_S = 2.0  # Prometheus waits 10
_DRAIN_S = 0.5  # for workers to turn readiness off
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 5.0  # of workers that take no connections
_LOOK_S = 0.05
_START_S = 30.0  # from the start of a process to its first message
_START_RETRY_S = 10.0  # in which the system may refuse a process at the start of the server
_KILL_S = 1.0  # after the grace period, for a worker that has not ended
_FORCE_S = 0.5  # after a second signal

_PROCESSES = ForkServerContext()
_PROCESSES.set_forkserver_preload(["serving.supervisor.preload"])

_log = structlog.get_logger()


@dataclass(frozen=True)
class WorkerProcess:
    """A process, and what it has reported."""

    process: ForkServerProcess
    peer: socket.socket
    connection: RpcConnection
    ready: bool = False  # whatever its siblings are
    max_message_bytes: int | None = None  # largest that it accepts; None: it does not listen yet
    refusal: str | None = None  # why it cannot serve the desired state


class WorkerSupervisor(Collector):
    """A fixed number of workers that serve one desired state. A `ModelHost`.

    Args:
        settings: Of each worker; the port is one that is held for them.
        deaths: Counts workers that ended by themselves or were killed.

    Attributes:
        lifecycle: Decides what they serve.
    """

    def __init__(self, settings: Settings, deaths: Counter) -> None:
        self._settings = settings
        self._deaths = deaths
        self._changed = threading.Condition()  # nothing else is waited for while it is held
        self._workers: dict[int, WorkerProcess] = {}
        self._orders: dict[str, Any] = {"failed": 0, "peers_ready": False}  # the last of each
        self._refusal: StartupError | None = None
        self._started = False
        self._ending = threading.Event()
        self._changes = ThreadPoolExecutor(1, "changes")
        self.lifecycle = ModelLifecycle(
            settings.model_repository, parse_policy(settings.version_policy), self
        )
        self._threads = [
            threading.Thread(target=self._keep, args=(index,), name=f"worker-{index}")
            for index in range(settings.processes)
        ]

    def start(self) -> None:
        """Start all workers, load what is to be served, and return when all of them listen.

        Raises:
            StartupError: A worker refuses to start, or there is nothing to serve.
            LayoutError: The repository cannot be read.
        """
        settings = self._settings
        for thread in self._threads:
            thread.start()
        self._await(lambda: len(self._workers) == settings.processes)
        load_at_start(
            self.lifecycle, settings.model_repository, settings.model_control, settings.load_models
        )
        self._order("listen", None)
        self._await(lambda: len(self.listening) == settings.processes)
        with self._changed:
            self._started = True
            self._update_ready()

    @property
    def ready(self) -> bool:
        """Whether every worker that takes connections is ready."""
        return bool(self._orders["peers_ready"])

    @property
    def listening(self) -> dict[int, WorkerProcess]:
        """The workers that take connections, by number."""
        with self._changed:
            return {i: w for i, w in self._workers.items() if w.max_message_bytes is not None}

    def load(self, version: PinnedVersion) -> LoadFailure | None:
        """Load a version in every worker; return why it failed in one, if it did.

        Raises:
            StartupError: The provider is not available.
        """
        self._await(lambda: bool(self._workers))
        answers = self._ask_all("load", version)
        wait(answers)
        # A worker that has ended meanwhile returns with the desired state.
        found = [a.result() for a in answers if not isinstance(a.exception(), PeerDisconnected)]
        if not found:
            reason = "every worker ended while it was being loaded"
            return LoadFailure(reason, reason, transient=True)
        return next((LoadFailure(**content) for content in found if content is not None), None)

    def publish(self, name: str, plans: Plans) -> None:
        """Have every worker serve the desired state of a model, and return when all do."""
        # A worker that hangs is killed, and one that cannot follow ends.
        wait(self._ask_all("publish", [name, plans]))

    def set_failed(self, count: int) -> None:
        """Have every worker report how many versions of the repository have failed."""
        self._order("failed", count)

    def cancel(self) -> None:
        """Do nothing: `stop`, which comes next, ends the loads of workers."""

    def drain(self) -> None:
        """Turn readiness and health off in all of them; requests are still taken."""
        self._ending.set()
        wait(self._order("peers_ready", False), _DRAIN_S)

    def stop(self, grace_s: float, now: Callable[[], bool]) -> None:
        """Take no more requests, let the running ones end, and return when no worker is left.

        Args:
            grace_s: How long they have, in seconds. A worker that has not ended then is killed.
            now: Once true, requests are waited for no longer.
        """
        self._ending.set()
        self.lifecycle.close()
        self._order("stop", grace_s)
        kill_at = time.monotonic() + grace_s + _KILL_S
        while any(thread.is_alive() for thread in self._threads):
            if now() and time.monotonic() + _FORCE_S < kill_at:
                kill_at = time.monotonic() + _FORCE_S
                self._order("stop", 0)
            if time.monotonic() > kill_at:
                with self._changed:
                    for worker in self._workers.values():
                        worker.process.kill()
            time.sleep(_LOOK_S)

    def collect(self) -> Iterator[Metric]:
        """Scrape all workers; return the metrics of those that answer, each under its number."""
        asked = {i: worker.connection.ask("metrics") for i, worker in self.listening.items()}
        done, _ = wait(asked.values(), _SCRAPE_S)
        families: dict[str, Metric] = {}
        for index, answer in asked.items():
            if answer not in done or answer.exception() is not None:
                continue
            for family in text_string_to_metric_families(answer.result()):
                own = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "worker": str(index)}
                    own.samples.append(sample._replace(labels=labels))
        yield from families.values()

    def report(self, name: str, version: str) -> bytes:
        """Return the report of a version, from the first worker that answers.

        Raises:
            ModelNotFound: There is none.
            ControlRefused: It cannot be had, or no worker answers.
        """
        for worker in self.listening.values():
            with suppress(PeerDisconnected, EngineError, TimeoutError):
                answer = worker.connection.ask("report", [name, version])
                return b64decode(answer.result(_SCRAPE_S))
        raise ControlRefused("no worker answers; the server's log says more")

    def _ask_all(self, what: str, argument: Any) -> list["Future[Any]"]:
        with self._changed:
            return [worker.connection.ask(what, argument) for worker in self._workers.values()]

    def _order(self, what: str, argument: Any) -> list["Future[Any]"]:
        """Have every worker do something, and every one that starts later."""
        with self._changed:
            self._orders[what] = argument
            return self._ask_all(what, argument)

    def _await(self, is_true: Callable[[], bool]) -> None:
        """Wait until something is true, or the start of the server is refused."""
        with self._changed:
            self._changed.wait_for(lambda: self._refusal is not None or is_true())
        if self._refusal is not None:
            raise self._refusal

    def _keep(self, index: int) -> None:
        """Run one worker, and another when it has ended."""
        backoff_s = _FIRST_BACKOFF_S
        give_up_at = time.monotonic() + _START_RETRY_S
        while not self._ending.is_set():
            try:
                worker = self._run(index)
                if worker.max_message_bytes is not None:
                    backoff_s = _FIRST_BACKOFF_S
                code = worker.process.exitcode
                event = partial(_log.error, "worker_died", code=code)
                reason = f"worker {index} ended with code {code} at its start"
                self._refuse_start(worker.refusal or reason)
            except OSError as error:  # the system has no process or no file for it now
                event = partial(_log.error, "worker_not_started", reason=str(error))
                if time.monotonic() > give_up_at:
                    self._refuse_start(
                        f"worker {index}: no process can be started: {error.strerror}; allow more "
                        "processes and open files, or start with fewer --workers"
                    )
            if self._ending.is_set() or self._refusal is not None:
                return
            self._deaths.inc()
            event(worker=index, again_in_s=backoff_s)
            self._ending.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    def _run(self, index: int) -> WorkerProcess:
        """Run a process from its start to its end.

        Raises:
            OSError: It cannot be started.
        """
        ours, its = socket.socketpair()
        with ours:
            with its:
                process = _PROCESSES.Process(
                    target=work, args=(self._settings, index, its), daemon=True
                )
                try:
                    process.start()
                except EOFError as error:  # the one that forks has none either, and starts anew
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
            _log.info("worker_started", worker=index, pid=process.pid)
            ours.settimeout(_START_S)
            handlers: dict[str, Callable[[Any], Any]] = {
                "ready": lambda ready: self._note(index, ready=ready),
                "listening": lambda limit: self._note(index, max_message_bytes=limit),
                "refused": lambda reason: self._note(index, refusal=reason),
                "load": lambda name: self._changes.submit(self.lifecycle.load, name),
                "unload": lambda name: self._changes.submit(self.lifecycle.unload, name),
            }
            worker = WorkerProcess(process, ours, RpcConnection(ours, handlers))
            with self._changed:  # it gets the whole desired state, then all that changes
                for model in self.lifecycle.plans.items():
                    worker.connection.ask("publish", model)
                for order in self._orders.items():
                    worker.connection.ask(*order)
                self._workers[index] = worker
                self._changed.notify_all()
            try:
                worker.connection.serve()
            except TimeoutError:
                _log.error("worker_hung", worker=index, silent_s=ours.gettimeout())
                process.kill()
            process.join()
        with self._changed:
            worker = self._workers.pop(index)
            self._update_ready()
        if self._started and worker.refusal is not None:
            _log.error("worker_refused", worker=index, reason=worker.refusal)
            if not self.listening:  # no worker is left that serves it
                self._changes.submit(self._start_over, self.lifecycle.plans)
        return worker

    def _note(self, index: int, **reported: Any) -> None:
        """Take what a worker reports; being ready or not is its heartbeat."""
        with self._changed:
            worker = self._workers[index] = replace(self._workers[index], **reported)
            worker.peer.settimeout(self._settings.worker_timeout_s)
            if worker.max_message_bytes is not None:
                self._orders["listen"] = worker.max_message_bytes
            self._update_ready()
            self._changed.notify_all()

    def _update_ready(self) -> None:
        """Find whether all are ready, and notify them of a change."""
        is_open = self._started and bool(self.listening) and not self._ending.is_set()
        ready = is_open and all(worker.ready for worker in self.listening.values())
        if ready != self.ready:
            self._order("peers_ready", ready)

    def _refuse_start(self, reason: str) -> None:
        """End the start of the server with an error, unless it is over."""
        with self._changed:
            if not self._started and self._refusal is None:
                self._refusal = StartupError(reason)
                self._changed.notify_all()

    def _start_over(self, lost: dict[str, Plans]) -> None:
        """Decide anew what is served, unless that was done since a worker refused these plans."""
        if self.lifecycle.plans != lost:
            return
        _log.error("desired_state_lost")
        try:
            self.lifecycle.start_over()
        except (BundleError, StartupError) as error:
            _log.error("repository_unreadable", reason=str(error))
