"""JSON messages between the supervisor and a worker, over a pipe.

Both ends are alike: each names the requests that it handles. Sending never blocks, because a thread
of the connection writes what is queued: a process that does not read holds up nothing but its own
messages. Nothing is unpickled.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import structlog

from serving.errors import (
    ControlRefused,
    EngineError,
    ModelNotFound,
    ServingError,
    StartupError,
)

_CROSSING = {kind.__name__: kind for kind in (ControlRefused, ModelNotFound, StartupError)}

Handler = Callable[[Any], Any]
"""Takes and returns what JSON can hold. It does not wait; if it must, it returns a Future."""

_log = structlog.get_logger()


class PeerDisconnected(ServingError):
    """The other process has ended."""


class RpcConnection:
    """The other process, as this one sees it. Thread-safe.

    Args:
        connection: A pipe between them.
        handlers: Of requests from the other process, by name. They run in the thread of `serve`, in
            the order of the requests.

    Attributes:
        heard_at: When the last message came, by `time.monotonic`.
    """

    def __init__(self, connection: "Connection[Any, Any]", handlers: Mapping[str, Handler]) -> None:
        self.heard_at = time.monotonic()
        self._connection = connection
        self._handlers = handlers
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._asked: dict[int, Future[Any]] = {}
        self._count = 0
        self._disconnected = False
        threading.Thread(target=self._write, name="rpc-write", daemon=True).start()

    def ask(self, what: str, argument: Any = None) -> "Future[Any]":
        """Send a request.

        Returns:
            Its answer; or a ControlRefused, ModelNotFound or StartupError as it was raised there,
            an EngineError for any other, or PeerDisconnected.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._disconnected:
                future.set_exception(PeerDisconnected("the other process has ended"))
                return future
            self._count += 1
            number = self._count
            self._asked[number] = future
        self._send({"ask": number, "what": what, "argument": argument})
        return future

    def notify(self, what: str, argument: Any = None) -> None:
        """Send a request that has no answer."""
        self._send({"what": what, "argument": argument})

    def serve(self) -> None:
        """Handle requests and answers until the other process has ended."""
        try:
            while True:
                message = json.loads(self._connection.recv_bytes())
                self.heard_at = time.monotonic()
                if "answer" in message:
                    self._take(message)
                else:
                    self._handle(message)
        except (EOFError, OSError):
            self._disconnect()

    def _handle(self, message: dict[str, Any]) -> None:
        what, number = message["what"], message.get("ask")
        try:
            found = self._handlers[what](message["argument"])
        except Exception as error:
            found = Future()
            found.set_exception(error)
        if isinstance(found, Future):
            found.add_done_callback(lambda done: self._answer(what, number, done))
        elif number is not None:
            self._send({"answer": number, "value": found})

    def _answer(self, what: str, number: int | None, done: "Future[Any]") -> None:
        error = done.exception()
        if error is not None and type(error).__name__ not in _CROSSING:
            _log.error("peer_failed", what=what, exc_info=error)
        if number is None:
            return
        if error is None:
            self._send({"answer": number, "value": done.result()})
        else:
            self._send({"answer": number, "error": [type(error).__name__, str(error)]})

    def _take(self, message: dict[str, Any]) -> None:
        with self._lock:
            future = self._asked.pop(message["answer"], None)
        if future is None:  # it could not be sent to the end any more
            return
        if "error" in message:
            kind, text = message["error"]
            future.set_exception(_CROSSING.get(kind, EngineError)(text))
        else:
            future.set_result(message["value"])

    def _send(self, message: dict[str, Any]) -> None:
        self._outgoing.put(json.dumps(message).encode())

    def _write(self) -> None:
        try:
            while (content := self._outgoing.get()) is not None:
                self._connection.send_bytes(content)
        except OSError:
            self._disconnect()

    def _disconnect(self) -> None:
        with self._lock:
            self._disconnected = True
            lost, self._asked = self._asked, {}
        self._outgoing.put(None)
        for future in lost.values():
            future.set_exception(PeerDisconnected("the other process has ended"))
