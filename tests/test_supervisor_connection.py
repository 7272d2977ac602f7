"""Two ends of a connection over a real socket, in one process."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest

from serving.errors import ControlRefused, EngineError, ModelNotFound, StartupError
from serving.models.desired_state import LoadFailure
from serving.supervisor.connection import PeerDisconnected, RpcConnection

Ends = tuple[socket.socket, socket.socket]
WAIT_S = 30.0  # for what happens at once unless something is wrong


def fail(error: Exception) -> Callable[[Any], Any]:
    def answer(_: Any) -> None:
        raise error

    return answer


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs
        for end in (ours, theirs):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # which ends a thread that reads


@pytest.fixture
def later() -> "Future[Any]":
    return Future()


@pytest.fixture
def client(ends: Ends, later: "Future[Any]") -> RpcConnection:
    ours, theirs = ends
    handlers: dict[str, Callable[[Any], Any]] = {
        "double": lambda x: 2 * x,
        "same": lambda x: x,
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


def test_a_process_that_reads_nothing_blocks_nobody(
    ends: Ends,
) -> None:
    """A socket takes some 200 kB; what is more waits in this process."""
    ours, theirs = ends
    client = RpcConnection(ours, {})
    futures = [client.ask("anything", "x" * 100_000) for _ in range(50)]
    theirs.close()
    client.serve()
    for future in futures:
        with pytest.raises(PeerDisconnected):
            future.result(WAIT_S)


def test_requests_fail_when_the_other_process_has_ended(
    ends: Ends,
) -> None:
    ours, theirs = ends
    client = RpcConnection(ours, {})
    before = client.ask("anything")
    theirs.close()
    client.serve()
    for future in (before, client.ask("anything")):
        with pytest.raises(PeerDisconnected):
            future.result(WAIT_S)


@pytest.mark.parametrize("sent", [b"", b'{"ask": 0, "what": "anything", "argu'])
def test_a_process_that_is_silent_for_too_long_is_noticed(ends: Ends, sent: bytes) -> None:
    """Also one that was stopped in the middle of a message."""
    ours, theirs = ends
    ours.settimeout(0.1)
    client = RpcConnection(ours, {})
    future = client.ask("anything")
    theirs.sendall(sent)
    with pytest.raises(TimeoutError):
        client.serve()
    with pytest.raises(PeerDisconnected):
        future.result(WAIT_S)


def test_a_process_may_end_in_the_middle_of_a_message(
    ends: Ends,
) -> None:
    ours, theirs = ends
    client = RpcConnection(ours, {})
    future = client.ask("anything")
    theirs.sendall(b'{"answer": 0, "val')
    theirs.close()
    client.serve()
    with pytest.raises(PeerDisconnected):
        future.result(WAIT_S)


def test_dataclasses_cross_as_their_fields(client: RpcConnection) -> None:
    failure = LoadFailure("/models/\udcff: of no encoding", "public", transient=True)
    assert client.ask("same", {7: failure}).result(WAIT_S) == {"7": vars(failure)}
