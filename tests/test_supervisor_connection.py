"""Two ends of a connection over a real pipe, in one process."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from serving.errors import ControlRefused, EngineError, ModelNotFound, StartupError
from serving.supervisor.connection import PeerDisconnected, RpcConnection

WAIT_S = 30.0  # for what happens at once unless something is wrong


def fail(error: Exception) -> Callable[[Any], Any]:
    def answer(_: Any) -> None:
        raise error

    return answer


@pytest.fixture
def later() -> "Future[Any]":
    return Future()


@pytest.fixture
def client(later: "Future[Any]") -> RpcConnection:
    ours, theirs = multiprocessing.Pipe()
    handlers: dict[str, Callable[[Any], Any]] = {
        "double": lambda x: 2 * x,
        "none": fail(ModelNotFound("there is none")),
        "refuse": fail(ControlRefused("not here")),
        "start": fail(StartupError("no provider")),
        "break": fail(RuntimeError("internal detail")),
        "wait": lambda _: later,
    }
    other, client = RpcConnection(theirs, handlers), RpcConnection(ours, {})
    for connection in (other, client):
        threading.Thread(target=connection.serve, daemon=True).start()
    return client


def test_requests_are_answered(client: RpcConnection) -> None:
    futures = [client.ask("double", i) for i in range(100)]
    assert [f.result(WAIT_S) for f in futures] == [2 * i for i in range(100)]


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("none", ModelNotFound, "there is none"),
        ("refuse", ControlRefused, "not here"),
        ("start", StartupError, "no provider"),
        ("break", EngineError, "internal detail"),
        ("unknown", EngineError, "unknown"),
    ],
)
def test_errors_cross(client: RpcConnection, what: str, kind: type, text: str) -> None:
    client.notify(what)  # which has no answer, and no effect
    with pytest.raises(kind, match=text):
        client.ask(what).result(WAIT_S)


def test_a_handler_that_takes_long_delays_no_other(
    client: RpcConnection, later: "Future[Any]"
) -> None:
    slow = client.ask("wait")
    assert client.ask("double", 1).result(WAIT_S) == 2
    assert not slow.done()
    later.set_result("done")
    assert slow.result(WAIT_S) == "done"


def test_a_process_that_reads_nothing_blocks_nobody() -> None:
    """A pipe takes some 200 kB; what is more waits in this process."""
    ours, theirs = multiprocessing.Pipe()
    client = RpcConnection(ours, {})
    futures = [client.ask("anything", "x" * 100_000) for _ in range(50)]
    client.notify("anything", "x" * 100_000)
    theirs.close()
    for future in futures:
        with pytest.raises(PeerDisconnected):
            future.result(WAIT_S)


def test_requests_fail_when_the_other_process_has_ended() -> None:
    ours, theirs = multiprocessing.Pipe()
    client = RpcConnection(ours, {})
    before = client.ask("anything")
    theirs.close()
    client.serve()
    for future in (before, client.ask("anything")):
        with pytest.raises(PeerDisconnected):
            future.result(WAIT_S)
