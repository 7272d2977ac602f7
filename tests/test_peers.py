"""Two peers over a real pipe, in one process."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serving.errors import ControlRefused, EngineError, ModelNotFound
from serving.peers import Gone, Peer

WAIT_S = 30.0  # for what happens at once unless something is wrong


def fail(error: Exception) -> Callable[[Any], Any]:
    def answer(_: Any) -> None:
        raise error

    return answer


@pytest.fixture
def pair() -> Iterator[tuple[Peer, threading.Event]]:
    """One that asks, and what holds the other one's task up."""
    ours, theirs = multiprocessing.Pipe()
    go = threading.Event()
    answers: dict[str, Callable[[Any], Any]] = {
        "double": lambda x: 2 * x,
        "none": fail(ModelNotFound("there is none")),
        "refuse": fail(ControlRefused("not here")),
        "break": fail(RuntimeError("internal detail")),
    }
    other = Peer(theirs, answers, {"wait": lambda _: go.wait(WAIT_S)})
    asking = Peer(ours, {}, {})
    for peer in (other, asking):
        threading.Thread(target=peer.serve, daemon=True).start()
    yield asking, go
    go.set()


def test_what_is_asked_is_answered(pair: tuple[Peer, threading.Event]) -> None:
    asking, _ = pair
    futures = [asking.ask("double", i) for i in range(100)]
    assert [f.result(WAIT_S) for f in futures] == [2 * i for i in range(100)]


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("none", ModelNotFound, "there is none"),
        ("refuse", ControlRefused, "not here"),
        ("break", EngineError, "internal detail"),
        ("unknown", EngineError, "unknown"),
    ],
)
def test_errors_cross(pair: tuple[Peer, threading.Event], what: str, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        pair[0].ask(what).result(WAIT_S)


def test_a_task_holds_no_answer_up(pair: tuple[Peer, threading.Event]) -> None:
    asking, go = pair
    task = asking.ask("wait")
    assert asking.ask("double", 1).result(WAIT_S) == 2
    assert not task.done()
    go.set()
    assert task.result(WAIT_S)


def test_whoever_waits_is_told_that_the_other_has_ended() -> None:
    ours, theirs = multiprocessing.Pipe()
    asking = Peer(ours, {}, {})
    before = asking.ask("anything")
    theirs.close()
    asking.serve()
    for future in (before, asking.ask("anything")):
        with pytest.raises(Gone):
            future.result(WAIT_S)
