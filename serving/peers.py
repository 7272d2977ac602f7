"""Two processes of the server that ask each other for things, over a pipe.

Both ends are alike: each names what it can be asked for. Messages are JSON; nothing is unpickled.
"""

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import structlog

from serving.errors import ControlRefused, EngineError, ModelNotFound, ServingError

_CROSSING = {kind.__name__: kind for kind in (ControlRefused, ModelNotFound)}
_TASKS_AT_ONCE = 4

_log = structlog.get_logger()


class Gone(ServingError):
    """The other process has ended."""


class Peer:
    """The other process, as this one sees it. Safe to call from several threads.

    Args:
        connection: A pipe between them.
        answers: What the other one may ask for, by name: each takes and gives what JSON can hold,
            and waits for nothing. They run one after the other, in the order asked.
        tasks: What it may ask for that takes its time; they run in threads of their own.
    """

    def __init__(
        self,
        connection: "Connection[Any, Any]",
        answers: Mapping[str, Callable[[Any], Any]],
        tasks: Mapping[str, Callable[[Any], Any]],
    ) -> None:
        self._connection = connection
        self._answers = answers
        self._tasks = tasks
        self._sending = threading.Lock()
        self._lock = threading.Lock()  # never held while something is sent
        self._asked: dict[int, Future[Any]] = {}
        self._count = 0
        self._gone = False

    def ask(self, what: str, argument: Any = None) -> "Future[Any]":
        """Ask for something.

        Returns:
            Its answer, in time; or a ControlRefused or ModelNotFound as it was raised there, an
            EngineError for any other, or Gone.
        """
        future: Future[Any] = Future()
        with self._lock:
            self._count += 1
            number = self._count
            self._asked[number] = future
        self._send({"ask": number, "what": what, "argument": argument})
        if self._gone:  # by now, or before; `serve` may have looked too early
            self._lose()
        return future

    def serve(self) -> None:
        """Answer, and take answers, until the other process has ended."""
        pool = ThreadPoolExecutor(_TASKS_AT_ONCE, "peer")
        try:
            while True:
                message = json.loads(self._connection.recv_bytes())
                if "answer" in message:
                    self._take(message)
                elif message["what"] in self._tasks:
                    pool.submit(self._answer, self._tasks, message)
                else:
                    self._answer(self._answers, message)
        except (EOFError, OSError):
            self._gone = True
            self._lose()
        finally:
            pool.shutdown(wait=False)

    def _answer(self, answers: Mapping[str, Callable[[Any], Any]], message: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"answer": message["ask"]}
        try:
            answer["value"] = answers[message["what"]](message["argument"])
        except Exception as error:
            answer["error"] = [type(error).__name__, str(error)]
            if type(error).__name__ not in _CROSSING:
                _log.error("peer_failed", what=message["what"], exc_info=error)
        self._send(answer)

    def _take(self, message: dict[str, Any]) -> None:
        with self._lock:
            future = self._asked.pop(message["answer"])
        if "error" in message:
            kind, text = message["error"]
            future.set_exception(_CROSSING.get(kind, EngineError)(text))
        else:
            future.set_result(message["value"])

    def _send(self, message: dict[str, Any]) -> None:
        content = json.dumps(message).encode()
        try:
            with self._sending:
                self._connection.send_bytes(content)
        except OSError:
            self._gone = True

    def _lose(self) -> None:
        with self._lock:
            lost, self._asked = self._asked, {}
        for future in lost.values():
            future.set_exception(Gone("the other process has ended"))
