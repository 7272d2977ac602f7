"""Worker processes on one port: started, watched, replaced, and kept at one desired state.

The supervisor decides with `ModelLifecycle` what is served, and writes it in one place, `_plans`.
Every change goes to all workers in the same order: first all load, then all change over. A worker
that starts gets the whole desired state, and listens once it serves it, so it is neither ahead of
its siblings nor behind. A worker whose heartbeats stop is killed and replaced.

No well-kept library does this. gunicorn's arbiter has heartbeats, timeouts and restarts, but it
forks, which gRPC survives only with care; it knows no state that workers must agree on, and its
workers are ready when they run. prometheus_client's multiprocess mode takes neither collectors nor
gauges of live state. The supervisor imports neither gRPC nor onnxruntime, and workers are started
afresh, because neither survives a fork.
"""

import math
import multiprocessing
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Sized
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait as wait_for_process
from typing import Any

import structlog
from prometheus_client import Counter

from kan_bundle.errors import BundleError
from serving.errors import ControlRefused, EngineError, StartupError
from serving.models.desired_state import LoadFailure, PinnedVersion, Plans, plans_to_json
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

_log = structlog.get_logger()


class WorkerSupervisor:
    """A fixed number of workers and the desired state that all of them serve. A `ModelHost`.

    Args:
        settings: Of each worker; the port is one that is held for them.
        deaths: Counts workers that ended by themselves or were killed.

    Attributes:
        lifecycle: Decides what they serve.
    """

    def __init__(self, settings: Settings, deaths: Counter) -> None:
        self._settings = settings
        self._deaths = deaths
        self._lock = threading.Lock()  # nothing waits while it is held
        self._changed = threading.Condition(self._lock)
        self._plans: dict[str, Plans] = {}
        self._failed = 0
        self._connections: dict[int, RpcConnection] = {}  # of workers that load what they are asked
        self._ready: dict[int, bool] = {}  # of workers that take connections
        self._all_ready = False
        self._may_listen = self._started = self._lost = False
        self._refusal: StartupError | None = None
        self._max_message_bytes: int | None = None
        self._ending = threading.Event()
        self._changes = ThreadPoolExecutor(1, "changes")
        self._kill_at = math.inf
        self.lifecycle = ModelLifecycle(
            settings.model_repository, parse_policy(settings.version_policy), self
        )
        self._threads = [
            threading.Thread(target=self._keep, args=(index,), name=f"worker-{index}")
            for index in range(settings.workers)
        ]

    def start(self) -> None:
        """Start all workers, load what is to be served, and return when all of them listen.

        Raises:
            StartupError: A worker refuses to start, or there is nothing to serve.
            LayoutError: The repository cannot be read.
        """
        for thread in self._threads:
            thread.start()
        self._await_all(self._connections)
        settings = self._settings
        load_at_start(
            self.lifecycle, settings.model_repository, settings.model_control, settings.load_models
        )
        with self._lock:
            self._may_listen = True
            for connection in self._connections.values():
                connection.notify("listen", self._max_message_bytes)
        self._await_all(self._ready)
        with self._lock:
            self._started = True
            self._update_ready()

    @property
    def ready(self) -> bool:
        """Whether every worker that takes connections is ready."""
        return self._all_ready

    @property
    def listening(self) -> int:
        """Number of workers that take connections."""
        return len(self._ready)

    def load(self, version: PinnedVersion) -> LoadFailure | None:
        """Load a version in every worker; return why it failed in one, if it did.

        Raises:
            StartupError: The provider is not available.
        """
        answers = self._broadcast("load", vars(version))
        wait(answers)
        found = []
        for answer in answers:
            with suppress(PeerDisconnected):  # it returns with the desired state
                found.append(answer.result())
        if not found:
            reason = "every worker ended while it was being loaded"
            return LoadFailure(reason, reason, transient=True)
        return next((LoadFailure(**content) for content in found if content is not None), None)

    def publish(self, name: str, plans: Plans) -> None:
        """Write the desired state of a model, and return when every worker serves it."""
        with self._lock:
            if plans:
                self._plans[name] = plans
            else:
                self._plans.pop(name, None)
            content = [name, plans_to_json(plans)]
            answers = [each.ask("publish", content) for each in self._connections.values()]
        wait(answers)  # a worker that hangs is killed, and one that cannot follow ends

    def set_failed(self, count: int) -> None:
        """Have every worker report how many versions of the repository have failed."""
        with self._lock:
            self._failed = count
            for connection in self._connections.values():
                connection.notify("failed", count)

    def cancel(self) -> None:
        """Do nothing: workers end their loads when they are told to stop, which comes next."""

    def drain(self) -> None:
        """Turn readiness and health off in all of them; requests are still taken."""
        self._ending.set()
        wait(self._broadcast("drain"), _DRAIN_S)

    def stop(self, grace_s: float, now: Callable[[], bool]) -> None:
        """Take no more requests, let the running ones end, and return when no worker is left.

        Args:
            grace_s: How long they have, in seconds. A worker that has not ended then is killed.
            now: Once true, requests are waited for no longer.
        """
        self._ending.set()
        self._kill_at = time.monotonic() + grace_s + _KILL_S
        self.lifecycle.close()
        self._notify_all("stop", grace_s)
        forced = False
        for thread in self._threads:
            while thread.is_alive():
                if now() and not forced:
                    forced = True
                    self._kill_at = min(self._kill_at, time.monotonic() + _FORCE_S)
                    self._notify_all("stop_now")
                thread.join(_LOOK_S)

    def close(self) -> None:
        """Leave no worker."""
        self.stop(0, lambda: True)

    def scrape(self) -> dict[int, str]:
        """Return the metrics of every worker that answers, in Prometheus's text format."""
        with self._lock:
            asked = {index: each.ask("metrics") for index, each in self._connections.items()}
        wait(asked.values(), _SCRAPE_S)
        return {
            index: future.result()
            for index, future in asked.items()
            if future.done() and future.exception() is None
        }

    def report(self, name: str, version: str) -> bytes:
        """Return the report of a version, from the first worker that answers.

        Raises:
            ModelNotFound: There is none.
            ControlRefused: It cannot be had, or no worker answers.
        """
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            with suppress(PeerDisconnected, EngineError, TimeoutError):
                return b64decode(connection.ask("report", [name, version]).result(_SCRAPE_S))
        raise ControlRefused("no worker answers; the server's log says more")

    def _await_all(self, workers: Sized) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._refusal is not None or len(workers) == self._settings.workers
            )
        if self._refusal is not None:
            raise self._refusal

    def _broadcast(self, what: str, argument: Any = None) -> list["Future[Any]"]:
        with self._lock:
            return [each.ask(what, argument) for each in self._connections.values()]

    def _notify_all(self, what: str, argument: Any = None) -> None:
        with self._lock:
            for connection in self._connections.values():
                connection.notify(what, argument)

    def _keep(self, index: int) -> None:
        """Run one worker, and another when it has ended."""
        backoff_s = _FIRST_BACKOFF_S
        give_up_at = time.monotonic() + _START_RETRY_S
        while not self._ending.is_set():
            try:
                code, has_listened = self._run(index)
                if has_listened:
                    backoff_s = _FIRST_BACKOFF_S
                event = partial(_log.error, "worker_died", code=code)
                self._refuse_start(f"worker {index} ended with code {code} at its start")
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

    def _run(self, index: int) -> tuple[int | None, bool]:
        """Run a process from its start to its end.

        Returns:
            Its exit code, negative for a signal, and whether it took connections.

        Raises:
            OSError: It cannot be started.
        """
        spawn = multiprocessing.get_context("spawn")
        ours, its = spawn.Pipe()
        with ours:
            with its:
                process = spawn.Process(target=work, args=(self._settings, index, its), daemon=True)
                process.start()
            _log.info("worker_started", worker=index, pid=process.pid)

            def note(status: dict[str, Any]) -> None:
                if status["stalled"]:
                    _log.error("worker_stalled", worker=index)
                    process.kill()
                self._note(index, connection, **status)

            connection = RpcConnection(
                ours,
                {
                    "status": note,
                    "refused": partial(self._refuse, index),
                    "load": lambda name: self._changes.submit(self.lifecycle.load, name),
                    "unload": lambda name: self._changes.submit(self.lifecycle.unload, name),
                },
            )
            connection.heard_at += _START_S
            reader = threading.Thread(target=connection.serve, name=f"rpc-{index}", daemon=True)
            reader.start()
            self._watch(index, process, connection)
            reader.join()  # it reads what the process has sent before its end
            with self._lock:
                self._connections.pop(index, None)
                has_listened = self._ready.pop(index, None) is not None
                self._update_ready()
        return process.exitcode, has_listened

    def _watch(self, index: int, process: Any, connection: RpcConnection) -> None:
        """Wait until a process has ended; kill it if its heartbeats stop, or it will not end."""
        while not wait_for_process([process.sentinel], _LOOK_S):
            now = time.monotonic()
            silent_s = now - connection.heard_at
            if silent_s > self._settings.worker_timeout_s:
                _log.error("worker_hung", worker=index, silent_s=round(silent_s, 1))
            elif now < self._kill_at and (index in self._connections or not self._ending.is_set()):
                continue
            process.kill()
            break
        process.join()

    def _note(
        self,
        index: int,
        connection: RpcConnection,
        *,
        attached: bool,
        ready: bool,
        stalled: bool,
        max_message_bytes: int | None,
    ) -> None:
        """Take a worker's status, which it sends when it changes, and as its heartbeat.

        Args:
            index: Of the worker.
            connection: To it.
            attached: Whether it can load models.
            ready: Whether it takes requests, whatever its siblings do.
            stalled: Whether its requests wait and nothing runs.
            max_message_bytes: Largest message that it accepts; None as long as it does not listen.
        """
        with self._lock:
            if attached and index not in self._connections:
                self._attach(index, connection)
            if max_message_bytes is not None:
                if index not in self._ready:
                    connection.notify("peers_ready", self._all_ready)
                self._max_message_bytes = max_message_bytes
                self._ready[index] = ready
            self._update_ready()
            self._changed.notify_all()

    def _attach(self, index: int, connection: RpcConnection) -> None:
        """Give a worker that has started the desired state, then have it listen."""
        self._connections[index] = connection
        for name, plans in self._plans.items():
            connection.ask("publish", [name, plans_to_json(plans)])
        connection.notify("failed", self._failed)
        connection.notify("peers_ready", self._all_ready)
        if self._may_listen:
            connection.notify("listen", self._max_message_bytes)
        if self._lost:
            self._lost = False
            self._changes.submit(self._start_over)

    def _update_ready(self) -> None:
        """Find whether all are ready, and notify them of a change."""
        ready = self._started and bool(self._ready) and all(self._ready.values())
        if ready != self._all_ready:
            self._all_ready = ready
            for connection in self._connections.values():
                connection.notify("peers_ready", ready)

    def _refuse(self, index: int, reason: str) -> None:
        """Note that a worker ends because it cannot serve the desired state."""
        if self._started:
            _log.error("worker_refused", worker=index, reason=reason)
        self._refuse_start(reason)
        with self._lock:
            if self._started and not self._ready:  # no worker is left that serves it
                self._plans.clear()
                self._lost = True

    def _refuse_start(self, reason: str) -> None:
        """End the start of the server with an error, unless it is over."""
        with self._changed:
            if not self._started and self._refusal is None:
                self._refusal = StartupError(reason)
                self._changed.notify_all()

    def _start_over(self) -> None:
        _log.error("desired_state_lost")
        try:
            self.lifecycle.start_over()
        except (BundleError, StartupError) as error:
            _log.error("repository_unreadable", reason=str(error))
