"""Threads around the batching core: requests wait for their turn in their own threads.

The thread of a batch's first request runs it for all, so that while there is room nothing is handed
from one thread to another. This module knows neither gRPC nor onnxruntime.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.batching import Batch, Item, Lane, Part, Queue

Arrays = Sequence[NDArray[Any]]
"""One array per tensor, all of the same number of rows."""


class Abandoned(Exception):
    """The request's deadline passed, or its client gave up, before it was answered."""


@dataclass(frozen=True)
class Outcome:
    """An answer, and how it came about.

    Args:
        outputs: One array per output.
        batch_rows: Rows in the run; in the largest, if there were several.
        queue_s: From arrival to the start of the first run, in seconds.
        compute_s: All runs, in seconds.
    """

    outputs: list[NDArray[Any]]
    batch_rows: int
    queue_s: float
    compute_s: float


@dataclass(eq=False)
class Request(Item):
    """What waits in a lane of a dispatcher.

    Args:
        inputs: One array per input, (rows, ...).
        run: The lane's engine.
    """

    inputs: Arrays
    run: Callable[[Arrays], Arrays]
    to_lead: Batch["Request"] | None = field(default=None, init=False)  # in its thread, now
    due: float | None = field(default=None, init=False)  # when to look for a batch again
    changed: threading.Event = field(default_factory=threading.Event, init=False)
    answers: list[Arrays] = field(default_factory=list, init=False)  # of its parts, in order
    answered: int = field(default=-1, init=False)  # rows, once there is an answer
    error: Exception | None = field(default=None, init=False)
    first_run: float | None = field(default=None, init=False)
    compute_s: float = field(default=0.0, init=False)
    batch_rows: int = field(default=0, init=False)

    @property
    def settled(self) -> bool:
        """Whether it is known what its client is told."""
        return self.error is not None or self.answered == self.rows


class Dispatcher:
    """Says in which thread what runs, and when. Safe to call from any number of threads.

    Args:
        slots: Runs at a time.
        clock: Seconds, never going back.
    """

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._queue: Queue[Request] = Queue(slots)

    def run(
        self,
        lane: Lane[Request],
        run: Callable[[Arrays], Arrays],
        inputs: Arrays,
        timeout_s: float | None,
        on_cancel: Callable[[Callable[[], None]], bool],
    ) -> Outcome:
        """Run one request: by itself, with others or in parts, as its lane's limits say.

        Args:
            lane: Where it waits; always the same for the same engine.
            run: The engine.
            inputs: One array per input, (rows, ...).
            timeout_s: How long its answer is wanted, in seconds.
            on_cancel: Is given what is to be called once its client has given up; tells whether it
                has not yet.

        Raises:
            QueueFull: There is no room.
            TooLate: The answer would come after its time.
            Abandoned: Its time passed while it waited, or its client gave up.
            Exception: What the engine raised for these rows.
        """
        now = self._clock()
        deadline = math.inf if timeout_s is None else now + timeout_s
        rows = len(inputs[0])
        with self._lock:
            alone = self._queue.start_alone(lane, rows, deadline - now)
        if alone:
            return self._run_alone(lane, run, inputs, now)
        size_bytes = sum(array.nbytes for array in inputs)
        request = Request(rows, size_bytes, now, deadline, inputs, run)
        with self._lock:
            self._queue.admit(lane, request)
            self._hand_out(now)
        if request.to_lead is None and not on_cancel(lambda: self._give_up(lane, request)):
            self._give_up(lane, request)
        # One that is given up runs its batch for the others all the same.
        while request.to_lead is not None or not request.settled:
            if request.to_lead is not None:
                self._lead(request, request.to_lead)
            else:
                self._wait(lane, request)
        if request.error is not None:
            raise request.error
        return _outcome(request)

    def seconds(self) -> float:
        """Tell how long it takes to run all that waits."""
        with self._lock:
            return self._queue.seconds

    def _run_alone(
        self, lane: Lane[Request], run: Callable[[Arrays], Arrays], inputs: Arrays, arrived: float
    ) -> Outcome:
        """Run a request that need not stand in line: all of its rows, in its own thread."""
        started, ended = self._clock(), None
        try:
            outputs = run(inputs)
            ended = self._clock()
        finally:
            with self._lock:
                rows, took = len(inputs[0]), None if ended is None else ended - started
                self._queue.end_alone(lane, rows, took)
                if self._queue:
                    self._hand_out(self._clock() if ended is None else ended)
        return Outcome(list(outputs), rows, started - arrived, ended - started)

    def _wait(self, lane: Lane[Request], request: Request) -> None:
        """Sleep until something happens to a request, or it is time to look for a batch."""
        until = request.deadline if request.due is None else min(request.due, request.deadline)
        timeout = min(max(0.0, until - self._clock()), threading.TIMEOUT_MAX)
        if request.changed.wait(timeout):
            request.changed.clear()
            return
        now = self._clock()
        with self._lock:
            if now >= request.deadline:
                self._abandon(lane, request)
            self._hand_out(now)

    def _lead(self, leader: Request, batch: Batch[Request]) -> None:
        """Run a batch and hand the answers out."""
        leader.to_lead = None
        parts = [part for part in batch.parts if not part.item.dropped]
        started = self._clock()
        answers = _run(parts)
        ended = self._clock()
        with self._lock:
            for part, answer in zip(parts, answers, strict=True):
                request = part.item
                if isinstance(answer, Exception):
                    request.error = request.error or answer
                    self._queue.drop(batch.lane, request)
                else:
                    request.answers.append(answer)
                    request.answered = part.stop
                    request.first_run = request.first_run or started
                    request.compute_s += ended - started
                    request.batch_rows = max(request.batch_rows, sum(p.rows for p in parts))
                if request.settled:
                    request.changed.set()
            self._queue.end(batch, ended - started if parts else None)
            self._hand_out(ended)

    def _give_up(self, lane: Lane[Request], request: Request) -> None:
        with self._lock:
            self._abandon(lane, request)
            self._hand_out(self._clock())

    def _abandon(self, lane: Lane[Request], request: Request) -> None:
        if not request.settled:
            request.error = Abandoned("nobody waits for the answer any longer")
            self._queue.drop(lane, request)
            request.changed.set()

    def _hand_out(self, now: float) -> None:
        """Give what is to run now to the threads that run it, and tell who is to look again when.

        The lock is held.
        """
        while (batch := self._queue.take(now)) is not None:
            leader = batch.parts[0].item
            leader.to_lead = batch
            leader.changed.set()
        waiting = self._queue.next_due(now)
        if waiting is not None:
            request, due = waiting
            if request.due != due:
                request.due = due
                request.changed.set()


def _run(parts: Sequence[Part[Request]]) -> list[Arrays | Exception]:
    """Run parts together; where that fails, each by itself, so that none hurts the others."""
    if not parts:
        return []
    try:
        outputs = parts[0].item.run(_stacked(parts))
    except Exception as error:
        if len(parts) == 1:
            return [error]
        return [answer for part in parts for answer in _run([part])]
    answers: list[Arrays | Exception] = []
    start = 0
    for part in parts:
        answers.append([output[start : start + part.rows] for output in outputs])
        start += part.rows
    return answers


def _stacked(parts: Sequence[Part[Request]]) -> Arrays:
    rows = [[array[p.start : p.stop] for array in p.item.inputs] for p in parts]
    return (
        rows[0]
        if len(rows) == 1
        else [np.concatenate(arrays) for arrays in zip(*rows, strict=True)]
    )


def _outcome(request: Request) -> Outcome:
    answers = request.answers
    first_run = request.arrived if request.first_run is None else request.first_run
    return Outcome(
        outputs=list(answers[0])
        if len(answers) == 1
        else [np.concatenate(arrays) for arrays in zip(*answers, strict=True)],
        batch_rows=request.batch_rows,
        queue_s=first_run - request.arrived,
        compute_s=request.compute_s,
    )
