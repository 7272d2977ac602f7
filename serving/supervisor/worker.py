"""One of several processes on a port: a whole server that serves the supervisor's desired state.

It handles the supervisor's changes one after the other, and listens only once it serves all of the
desired state. A worker that cannot serve it ends, and another one starts. gRPC and onnxruntime are
imported only here, because the supervisor imports this module, too.
"""

import gc
import math
import os
import signal
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NoReturn

import structlog
from prometheus_client import generate_latest

from kan_bundle.errors import BundleError
from serving.errors import StartupError
from serving.models.desired_state import LoadFailure, PinnedVersion, plans_from_json
from serving.observability.logs import configure_logging
from serving.readiness import Readiness
from serving.runtime import require_onnxruntime
from serving.settings import Settings
from serving.supervisor.connection import RpcConnection

if TYPE_CHECKING:
    from serving.models.host import LocalHost
    from serving.server import Server

_HEARTBEAT_S = 0.5
_REPORT_S = 5.0  # for the supervisor to hear why a worker ends

_log = structlog.get_logger()


def work(settings: Settings, index: int, connection: socket.socket) -> None:
    """Run a worker until the supervisor stops it or ends. Does not return.

    Args:
        settings: What to serve, and on which port.
        index: Number of the worker, for the log.
        connection: To the supervisor.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):  # a terminal sends them to all processes
        signal.signal(signum, signal.SIG_IGN)
    configure_logging(settings.log_level, worker=index)
    worker = Worker(settings, connection)
    try:
        worker.run()
    except (StartupError, BundleError) as error:
        worker.refuse(str(error))
    # Not `return`: a thread in which a model still runs would hold the process.
    os._exit(0)


class Worker:
    """The supervisor's side of a worker: its desired state, and when to listen and to stop.

    Args:
        settings: Of the server.
        connection: To the supervisor.
    """

    def __init__(self, settings: Settings, connection: socket.socket) -> None:
        self._settings = settings
        self._host: Future[LocalHost] = Future()
        self._may_listen: Future[int | None] = Future()
        self._server: Future[Server] = Future()
        self._stop = threading.Event()
        self._cut_off_at = math.inf
        self._changes = ThreadPoolExecutor(1, "changes")
        self._reports = ThreadPoolExecutor(1, "reports")
        self._readiness = Readiness(others=False, on_own_change=lambda own: self._report_ready())
        handlers: dict[str, Callable[[Any], Any]] = {
            "load": lambda version: self._changes.submit(self._load, version),
            "publish": lambda model: self._changes.submit(self._publish, *model),
            "failed": lambda count: self._changes.submit(self._set_failed, count),
            "listen": lambda limit: self._changes.submit(self._may_listen.set_result, limit),
            "peers_ready": self._readiness.hear,
            "stop": self._stop_within,
            "metrics": lambda _: generate_latest(self._server.result().registry).decode(),
            "report": lambda version: self._reports.submit(self._report, *version),
        }
        self._supervisor = RpcConnection(connection, handlers)

    def run(self) -> None:
        """Serve until the supervisor says so or has ended.

        Raises:
            StartupError: It cannot serve what it was asked to, or not there.
        """
        for target in (self._listen_to_supervisor, self._send_heartbeats):
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True).start()
        require_onnxruntime()
        from serving.server import running  # imports onnxruntime

        with running(self._settings, self._readiness, self) as server:
            self._server.set_result(server)
            gc.collect()  # as in __main__
            gc.freeze()
            self._supervisor.ask("listening", server.max_message_bytes)
            self._stop.wait()
            server.stop(self._settings.grace_s, lambda: time.monotonic() >= self._cut_off_at)

    def attach(self, host: "LocalHost") -> int | None:
        """Let the supervisor load models, and wait until this worker serves the desired state.

        Returns:
            The largest message that the other workers accept; None if this one is to choose.
        """
        self._host.set_result(host)
        return self._may_listen.result()

    def load(self, name: str) -> None:
        """Have every worker serve the present content of a model's folder."""
        self._supervisor.ask("load", name).result()

    def unload(self, name: str) -> None:
        """Have every worker stop serving a model."""
        self._supervisor.ask("unload", name).result()

    def refuse(self, reason: str) -> NoReturn:
        """End, because the desired state cannot be served."""
        wait([self._supervisor.ask("refused", reason)], _REPORT_S)
        os._exit(1)

    def _load(self, version: dict[str, Any]) -> LoadFailure | None:
        return self._host.result().load(PinnedVersion(**version))

    def _publish(self, name: str, content: dict[str, Any]) -> None:
        host, plans = self._host.result(), plans_from_json(content)
        for plan in plans.values():
            if plan.pinned is not None and not host.has(plan.pinned):
                failure = host.load(plan.pinned)
                if failure is not None:
                    self.refuse(failure.reason)
        host.publish(name, plans)

    def _set_failed(self, count: int) -> None:
        self._host.result().set_failed(count)

    def _report(self, name: str, version: str) -> str:
        from serving.observability.reports import read_report  # imports onnxruntime

        return b64encode(read_report(self._server.result().repository, name, version)).decode()

    def _stop_within(self, grace_s: float) -> None:
        if not self._server.done():  # there is nothing to end
            os._exit(0)
        self._host.result().cancel()
        self._cut_off_at = time.monotonic() + grace_s
        self._stop.set()

    def _send_heartbeats(self) -> None:
        while True:  # until the process ends
            self._report_ready()
            time.sleep(_HEARTBEAT_S)
            if self._server.done() and self._server.result().is_stalled:
                _log.error("worker_stalled")
                os.kill(os.getpid(), signal.SIGKILL)

    def _report_ready(self) -> None:
        self._supervisor.ask("ready", self._readiness.own)

    def _listen_to_supervisor(self) -> None:
        self._supervisor.serve()
        _log.error("supervisor_lost")
        self._readiness.drain()
        self._stop_within(self._settings.grace_s)
