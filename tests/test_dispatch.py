"""The dispatcher with real threads, and engines that wait until they are told to go on."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.batching import Lane, Limits, QueueFull, TooLate
from serving.dispatch import Abandoned, Arrays, Dispatcher, Outcome, Request

LONG_S = 3600.0
WAIT_S = 30.0  # for what happens at once unless something is wrong


@dataclass
class Doubler:
    """Answers 2 x, remembers the runs, and fails for rows with a negative number."""

    go: threading.Event = field(default_factory=threading.Event)
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    runs: list[list[float]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, inputs: Arrays) -> Arrays:
        (x,) = inputs
        with self.lock:
            self.runs.append(x[:, 0].tolist())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.started.release()
        assert self.go.wait(WAIT_S)
        with self.lock:
            self.at_once -= 1
        if (x < 0).any():
            raise ValueError("negative")
        return [2 * x]


class Client:
    """Sends requests; each ends in a future."""

    def __init__(
        self,
        engine: Doubler,
        slots: int = 1,
        clock: Callable[[], float] = time.monotonic,
        **limits: Any,
    ) -> None:
        wanted: dict[str, Any] = {
            "max_batch_rows": 4,
            "max_wait_s": 0.0,
            "max_queue_rows": 10**6,
            "max_queue_bytes": 10**9,
        }
        self.engine = engine
        self.dispatcher = Dispatcher(slots, clock)
        self.lane: Lane[Request] = Lane(Limits(**(wanted | limits)))
        self.requests: dict[int, Request] = {}

    def __enter__(self) -> "Client":
        self.dispatcher.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.dispatcher.__exit__(None, None, None)

    def send(self, *values: float, timeout_s: float | None = None) -> "Future[Outcome]":
        x: NDArray[np.float32] = np.array(values, np.float32).reshape(-1, 1)
        future: Future[Outcome] = Future()

        def tell(end: Outcome | Exception) -> None:
            if isinstance(end, Exception):
                future.set_exception(end)
            else:
                future.set_result(end)

        request = self.dispatcher.submit(self.lane, self.engine, [x], timeout_s, tell)
        self.requests[id(future)] = request
        return future

    def give_up(self, future: "Future[Outcome]") -> None:
        self.dispatcher.give_up(self.lane, self.requests[id(future)])

    def of_long_runs(self) -> "Client":
        """Let it be known that runs take long, so that requests run by themselves."""
        self.lane.pace.learn(1, 1.0)
        return self


@pytest.fixture
def engine() -> Iterator[Doubler]:
    engine = Doubler()
    yield engine
    engine.go.set()


def answer(future: "Future[Outcome]") -> list[float]:
    return [float(v) for v in future.result(WAIT_S).outputs[0][:, 0]]


def test_a_request_is_answered_with_what_it_took(engine: Doubler) -> None:
    engine.go.set()
    with Client(engine) as client:
        outcome = client.send(1, 2).result(WAIT_S)
    assert outcome.outputs[0].tolist() == [[2], [4]]
    assert outcome.batch_rows == 2
    assert outcome.queue_s >= 0
    assert outcome.compute_s > 0


def test_requests_that_wait_for_company_run_together(engine: Doubler) -> None:
    engine.go.set()
    with Client(engine, max_wait_s=LONG_S) as client:
        futures = [client.send(i) for i in range(4)]
        assert [answer(f) for f in futures] == [[0], [2], [4], [6]]
    assert engine.runs == [[0, 1, 2, 3]]
    assert [f.result().batch_rows for f in futures] == [4] * 4


def test_requests_that_are_there_together_run_together(engine: Doubler) -> None:
    with Client(engine, clock=lambda: 0.0) as client:  # where every run is a short one
        first = client.send(0)
        assert engine.started.acquire(timeout=WAIT_S)
        futures = [client.send(i) for i in range(1, 4)]
        engine.go.set()
        assert [answer(f) for f in (first, *futures)] == [[0], [2], [4], [6]]
    assert engine.runs == [[0], [1, 2, 3]]


def test_nobody_waits_for_company_longer_than_allowed(engine: Doubler) -> None:
    engine.go.set()
    with Client(engine, max_wait_s=0.01) as client:
        assert answer(client.send(1)) == [2]


def test_a_request_too_large_is_put_together_again(engine: Doubler) -> None:
    engine.go.set()
    with Client(engine) as client:
        assert answer(client.send(*range(10))) == [2 * i for i in range(10)]
    assert engine.runs == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_no_rows_are_answered_with_none(engine: Doubler) -> None:
    engine.go.set()
    with Client(engine) as client:
        assert answer(client.send()) == []


def test_who_cannot_be_run_does_not_hurt_its_neighbours(engine: Doubler) -> None:
    engine.go.set()
    with Client(engine, max_wait_s=LONG_S) as client:
        good, bad, other = client.send(1, 2), client.send(-1), client.send(3)
        assert answer(good) == [2, 4]
        assert answer(other) == [6]
        with pytest.raises(ValueError, match="negative"):
            bad.result(WAIT_S)


def test_no_more_run_at_once_than_there_are_slots(engine: Doubler) -> None:
    with Client(engine, slots=2).of_long_runs() as client:
        futures = [client.send(i) for i in range(8)]
        for _ in range(2):
            assert engine.started.acquire(timeout=WAIT_S)
        engine.go.set()
        assert [answer(f) for f in futures] == [[2 * i] for i in range(8)]
    assert engine.most_at_once == 2


def test_failures_give_their_slots_back(engine: Doubler) -> None:
    engine.go.set()
    with Client(engine) as client:
        for _ in range(5):
            with pytest.raises(ValueError, match="negative"):
                client.send(-1).result(WAIT_S)
        assert answer(client.send(1)) == [2]


def test_a_client_that_gives_up_is_not_run_and_the_others_are(engine: Doubler) -> None:
    with Client(engine) as client:
        running = client.send(1)
        assert engine.started.acquire(timeout=WAIT_S)
        gone, waiting = client.send(2), client.send(3)
        client.give_up(gone)
        with pytest.raises(Abandoned):
            gone.result(WAIT_S)
        engine.go.set()
        assert answer(running) == [2]
        assert answer(waiting) == [6]
    assert engine.runs == [[1], [3]]


def test_the_first_of_a_batch_may_give_up_without_harm_to_the_rest(engine: Doubler) -> None:
    engine.go.set()
    with Client(engine, max_wait_s=LONG_S) as client:
        first, second = client.send(1), client.send(2)
        client.give_up(first)
        with pytest.raises(Abandoned):
            first.result(WAIT_S)
        third = client.send(3, 4, 5)
        assert answer(second) == [4]
        assert answer(third) == [6, 8, 10]
    assert engine.runs == [[2, 3, 4, 5]]


def test_who_gives_up_while_it_runs_is_told_once_and_its_neighbours_are_answered(
    engine: Doubler,
) -> None:
    with Client(engine, max_wait_s=LONG_S) as client:
        gone, other = client.send(1, 2), client.send(3, 4)
        assert engine.started.acquire(timeout=WAIT_S)
        client.give_up(gone)
        client.give_up(gone)
        engine.go.set()
        assert answer(other) == [6, 8]
        with pytest.raises(Abandoned):
            gone.result(WAIT_S)


def test_what_has_expired_is_not_run(engine: Doubler) -> None:
    with Client(engine) as client:
        running = client.send(1)
        assert engine.started.acquire(timeout=WAIT_S)
        expired = client.send(2, timeout_s=1e-6)
        engine.go.set()
        assert answer(running) == [2]
        assert answer(client.send(3)) == [6]
        client.give_up(expired)  # as gRPC says at the deadline
        with pytest.raises(TooLate):
            expired.result(WAIT_S)
    assert engine.runs == [[1], [3]]


def test_what_has_expired_in_line_is_told_so_when_its_turn_comes(engine: Doubler) -> None:
    with Client(engine) as client:
        running = client.send(1)
        assert engine.started.acquire(timeout=WAIT_S)
        expired, waiting = client.send(2, timeout_s=1e-6), client.send(3)
        engine.go.set()
        assert answer(running) == [2]
        with pytest.raises(TooLate):
            expired.result(WAIT_S)
        assert answer(waiting) == [6]
        client.give_up(expired)  # is told once, or the future would raise
    assert engine.runs == [[1], [3]]


def test_what_has_no_time_left_is_refused(engine: Doubler) -> None:
    with Client(engine) as client, pytest.raises(TooLate):
        client.send(1, timeout_s=0)


def test_a_full_queue_refuses_at_once(engine: Doubler) -> None:
    with Client(engine, max_queue_rows=2) as client:
        running = client.send(1)
        assert engine.started.acquire(timeout=WAIT_S)
        waiting = client.send(2, 3)
        with pytest.raises(QueueFull):
            client.send(4)
        engine.go.set()
        assert answer(running) == [2]
        assert answer(waiting) == [4, 6]


def test_many_threads_get_their_own_answers() -> None:
    engine = Doubler()
    engine.go.set()
    values = np.random.default_rng(0).integers(0, 8, 300)
    with (
        Client(engine, slots=2, max_batch_rows=5, max_wait_s=0.001) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        futures = list(
            pool.map(lambda pair: client.send(*range(pair[0], sum(pair))), enumerate(values))
        )
        for i, (future, n) in enumerate(zip(futures, values, strict=True)):
            assert answer(future) == [2 * v for v in range(i, i + int(n))]
    assert max(map(len, engine.runs)) <= 5
    assert sum(map(len, engine.runs)) == values.sum()


def test_after_the_end_nothing_is_run(engine: Doubler) -> None:
    engine.go.set()
    with Client(engine) as client:
        assert answer(client.send(1)) == [2]
    late = client.send(2)
    for thread in client.dispatcher._threads:
        thread.join(WAIT_S)
    assert not late.done()


@pytest.mark.parametrize("error", [ValueError("ours"), MemoryError(), SystemExit()])
def test_a_callback_that_raises_ends_no_thread_and_no_other_request(
    engine: Doubler, error: BaseException
) -> None:
    engine.go.set()

    def fail(end: Outcome | Exception) -> None:
        raise error

    with Client(engine, max_wait_s=LONG_S) as client:
        for _ in range(3):
            rows: NDArray[np.float32] = np.ones((1, 1), np.float32)
            client.dispatcher.submit(client.lane, engine, [rows], None, fail)
            assert answer(client.send(1, 2, 3)) == [2, 4, 6]


def test_a_run_that_ends_its_thread_fails_its_requests_and_gives_the_slot_back(
    engine: Doubler,
) -> None:
    class Exiting(Doubler):
        def __call__(self, inputs: Arrays) -> Arrays:
            if inputs[0][0, 0] == 7:
                raise SystemExit
            return super().__call__(inputs)

    exiting = Exiting()
    exiting.go.set()
    with Client(exiting) as client:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="SystemExit"):
                client.send(7).result(WAIT_S)
            assert answer(client.send(1)) == [2]


def test_it_is_stalled_when_requests_wait_and_nothing_runs(engine: Doubler) -> None:
    now = 0.0
    client = Client(engine, clock=lambda: now)  # no thread has started
    now = 100.0
    assert not client.dispatcher.is_stalled  # nothing waits
    client.send(1)
    now = 110.0
    assert not client.dispatcher.is_stalled
    now = 110.1
    assert client.dispatcher.is_stalled


def test_a_long_run_is_no_stall(engine: Doubler) -> None:
    now = 0.0
    with Client(engine, clock=lambda: now).of_long_runs() as client:
        first = client.send(1)
        assert engine.started.acquire(timeout=WAIT_S)
        second = client.send(2)
        now = 599.0
        assert not client.dispatcher.is_stalled
        now = 601.0
        assert client.dispatcher.is_stalled
        engine.go.set()
        assert answer(first) == [2]
        assert answer(second) == [4]
        assert not client.dispatcher.is_stalled


def test_what_its_caller_runs_is_run_to_the_last_though_nobody_wakes_a_thread() -> None:
    doubler = Doubler()
    doubler.go.set()
    lane: Lane[Request] = Lane(Limits(4, 0.0, 10**6, 10**9))
    lane.pace.learn(4, 1e-4)
    x = np.ones((4, 1), np.float32)
    with Dispatcher(2) as dispatcher:
        ends: list[Any] = []
        for _ in range(3):
            dispatcher.submit(lane, doubler, [x], None, ends.append, by_caller=True)
        assert not ends
        while dispatcher.has_work:
            dispatcher.run_short()
        assert len(ends) == 3
        assert all(isinstance(end, Outcome) for end in ends)


def test_what_does_not_end_soon_is_run_by_a_thread() -> None:
    doubler = Doubler()
    lane: Lane[Request] = Lane(Limits(4, 0.0, 10**6, 10**9))
    lane.pace.learn(4, 1.0)
    with Dispatcher(1) as dispatcher:
        ended: Future[Any] = Future()
        x = np.ones((4, 1), np.float32)
        dispatcher.submit(lane, doubler, [x], None, ended.set_result, by_caller=True)
        dispatcher.run_short()
        assert doubler.started.acquire(timeout=WAIT_S)  # in another thread, as this one goes on
        doubler.go.set()
        assert isinstance(ended.result(WAIT_S), Outcome)
