"""One of several processes on a port: a whole server that does as its keeper says; see workers.py.

gRPC and onnxruntime are imported only once it runs, because the keeper imports this module, too.
"""

import gc
import os
import signal
import threading
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import structlog
from prometheus_client import generate_latest

from kan_bundle.errors import BundleError
from serving.errors import EngineError, StartupError
from serving.observability.logs import configure_logging
from serving.peers import Gone, Peer
from serving.readiness import Readiness
from serving.settings import Settings

_log = structlog.get_logger()


class _SharedControl:
    """What a client asks of one worker is done in all.

    Args:
        keeper: Passes it on.
    """

    def __init__(self, keeper: Peer) -> None:
        self._keeper = keeper

    def load(self, name: str) -> None:
        """Serve what lies in a model's folder now."""
        self._keeper.ask("load", name).result()

    def unload(self, name: str) -> None:
        """Serve a model no longer."""
        self._keeper.ask("unload", name).result()


def work(settings: Settings, index: int, connection: "Connection[Any, Any]") -> None:
    """Be a worker, until the keeper says so or is gone. Does not return.

    Args:
        settings: What to serve, and on which port.
        index: Which worker, for the log.
        connection: To the keeper.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):  # a terminal sends them to all: the keeper acts
        signal.signal(signum, signal.SIG_IGN)
    configure_logging(settings.log_level, worker=index)
    from serving.runtime import require_onnxruntime

    started: Future[Any] = Future()  # the server
    stop, now = threading.Event(), threading.Event()
    grace_s = settings.grace_s

    def stop_in(seconds: float) -> None:
        nonlocal grace_s
        grace_s = seconds
        stop.set()

    def stop_now(_: Any) -> None:
        if not started.done():  # there is nothing to end
            os._exit(0)
        now.set()
        stop.set()

    def report(version: list[str]) -> str:
        from serving.observability.reports import read_report  # imports onnxruntime

        repository = started.result().repository
        return b64encode(read_report(repository, *version)).decode()

    answers: dict[str, Callable[[Any], Any]] = {
        "ready": lambda ready: readiness.hear(ready),
        "drain": lambda _: readiness.drain(),
        "stop": stop_in,
        "stop_now": stop_now,
        "metrics": lambda _: generate_latest(started.result(0).registry).decode(),
    }
    tasks: dict[str, Callable[[Any], Any]] = {
        "load": lambda name: started.result().keeper.load(name),
        "unload": lambda name: started.result().keeper.unload(name),
        "report": report,
    }
    keeper = Peer(connection, answers, tasks)

    def tell(own: bool) -> None:
        keeper.ask("able", own)

    readiness = Readiness(others=False, on_own_change=tell)

    def listen() -> None:
        keeper.serve()
        if not started.done():
            os._exit(1)
        _log.error("keeper_gone")
        readiness.drain()
        stop.set()

    threading.Thread(target=listen, name="keeper", daemon=True).start()
    try:
        require_onnxruntime()
        from serving.server import running  # imports onnxruntime

        with running(settings, readiness, _SharedControl(keeper)) as server:
            started.set_result(server)
            gc.collect()  # as in __main__
            gc.freeze()
            keeper.ask("listening")
            stop.wait()
            server.stop(grace_s, now.is_set)
    except (StartupError, BundleError) as error:
        with suppress(EngineError, Gone):
            keeper.ask("refused", str(error)).result()
        os._exit(1)
    # Not `return`: a thread in which a model still runs would hold the process.
    os._exit(0)
