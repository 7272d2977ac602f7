"""JSON messages between the supervisor and a worker, over a socket, one a line.

Both ends are alike: each names the requests that it handles, and every request is answered. Sending
never blocks, because a thread of the connection writes what is queued: a process that does not read
holds up nothing but its own messages. Nothing is unpickled.
"""

import itertools
import json
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import structlog

from serving.errors import ControlRefused, EngineError, ModelNotFound, ServingError, StartupError

_CROSSING = {kind.__name__: kind for kind in (ControlRefused, ModelNotFound, StartupError)}

_log = structlog.get_logger()


class PeerDisconnected(ServingError):
    """The other process has ended."""


class RpcConnection:
    """The other process, as this one sees it. Thread-safe.

    Args:
        peer: A socket that is connected to it. Its timeout limits each wait for the other process.
        handlers: Of requests from the other process, by name. They run in the thread of `serve`, in
            the order of the requests. Each takes what JSON can hold, and returns that or
            dataclasses. It does not wait; if it must, it returns a Future.
    """

    def __init__(self, peer: socket.socket, handlers: Mapping[str, Callable[[Any], Any]]) -> None:
        self._socket = peer
        self._handlers = handlers
        self._writer = ThreadPoolExecutor(1, "rpc-write")
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Any]] = {}
        self._is_connected = True

    def ask(self, what: str, argument: Any = None) -> "Future[Any]":
        """Send a request.

        Returns:
            Its answer; or a ControlRefused, ModelNotFound or StartupError as it was raised there,
            an EngineError for any other, or PeerDisconnected.
        """
        future: Future[Any] = Future()
        number = next(self._numbers)
        with self._lock:
            if not self._is_connected:
                future.set_exception(PeerDisconnected("the other process has ended"))
                return future
            self._pending[number] = future
        self._send({"ask": number, "what": what, "argument": argument})
        return future

    def serve(self) -> None:
        """Handle requests and answers until the other process has ended.

        Raises:
            TimeoutError: It sends nothing within the timeout of the socket.
        """
        try:
            # A ValueError is half a line: the other process was killed while it wrote.
            with suppress(ConnectionError, ValueError), self._socket.makefile("rb") as lines:
                for line in lines:
                    self._handle(json.loads(line))
        finally:
            with self._lock:
                self._is_connected = False
            for future in self._pending.values():
                future.set_exception(PeerDisconnected("the other process has ended"))

    def _handle(self, message: dict[str, Any]) -> None:
        if "ask" in message:
            self._answer(message, lambda: self._handlers[message["what"]](message["argument"]))
            return
        future = self._pending.pop(message["answer"])
        if "error" in message:
            kind, text = message["error"]
            future.set_exception(_CROSSING.get(kind, EngineError)(text))
        else:
            future.set_result(message["value"])

    def _answer(self, request: dict[str, Any], handle: Callable[[], Any]) -> None:
        """Send what a handler returns or raises; if it returns a Future, once that is done."""
        try:
            value = handle()
            if isinstance(value, Future):
                value.add_done_callback(lambda done: self._answer(request, done.result))
                return
            answer = {"value": value}
        except Exception as error:
            kind = type(error).__name__
            if kind not in _CROSSING:
                _log.error("peer_failed", what=request["what"], exc_info=error)
            answer = {"error": [kind, str(error)]}
        self._send({"answer": request["ask"], **answer})

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message, default=vars) + "\n"  # of dataclasses, the fields
        self._writer.submit(self._socket.sendall, line.encode())
