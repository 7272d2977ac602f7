"""Threads around the batching core: a few run what waits, and tell whoever asked.

Who asks does not wait in a thread: it leaves a request and what is to be told of its end. As many
threads as there are slots take batches from the core, run them, and tell. So a thread is handed
from one to another once a batch, not once a request: single rows get through more than twice
as fast as with a thread each (`python -m benchmarks.serving`). This module knows neither gRPC nor
onnxruntime.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from serving.batching import Batch, Item, Lane, Part, Queue, TooLate

Arrays = Sequence[NDArray[Any]]
"""One array per tensor, all of the same number of rows."""


class Abandoned(Exception):
    """The request's deadline passed, or its client gave up, before it was answered."""


class Outcome(NamedTuple):
    """An answer, and how it came about.

    Args:
        outputs: One array per output.
        batch_rows: Rows in the run; in the largest, if there were several.
        queue_s: From arrival to the start of the first run, in seconds.
        batch_wait_s: Of that, waiting for others to run with.
        compute_s: All runs, in seconds.
    """

    outputs: Arrays
    batch_rows: int
    queue_s: float
    batch_wait_s: float
    compute_s: float


@dataclass(eq=False)
class Request(Item):
    """What waits in a lane of a dispatcher.

    Args:
        inputs: One array per input, (rows, ...).
        run: The lane's engine.
        tell: Told the end, once: from a thread that runs batches, or from whoever gives up. It must
            not raise, and should not take long.
    """

    inputs: Arrays
    run: Callable[[Arrays], Arrays]
    tell: Callable[[Outcome | Exception], None]
    told: bool = field(default=False, init=False)
    answers: list[Arrays] = field(default_factory=list, init=False)  # of its parts, in order
    first_run: float = field(default=0.0, init=False)
    batch_wait_s: float = field(default=0.0, init=False)
    compute_s: float = field(default=0.0, init=False)
    batch_rows: int = field(default=0, init=False)


class Dispatcher:
    """Runs what waits, in threads of its own. Safe to call from any number of threads.

    As a context manager it has its threads within the block; at the end nothing more is run.

    Args:
        slots: Runs at a time.
        clock: Seconds, never going back.
    """

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._queue: Queue[Request] = Queue(slots)
        self._idle = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"engine-{i}", daemon=True)
            for i in range(slots)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with self._news:
            self._closed = True
            self._news.notify_all()

    def submit(
        self,
        lane: Lane[Request],
        run: Callable[[Arrays], Arrays],
        inputs: Arrays,
        timeout_s: float | None,
        tell: Callable[[Outcome | Exception], None],
    ) -> Request:
        """Have one request run: by itself, with others or in parts, as its lane's limits say.

        Args:
            lane: Where it waits; always the same for the same engine.
            run: The engine.
            inputs: One array per input, (rows, ...).
            timeout_s: How long its answer is wanted, in seconds.
            tell: Told the answer, what the engine raised for these rows, Abandoned, or TooLate.

        Returns:
            The request, for `give_up`.

        Raises:
            QueueFull: There is no room.
            TooLate: The answer would come after its time.
        """
        now = self._clock()
        deadline = math.inf if timeout_s is None else now + timeout_s
        size_bytes = sum([array.nbytes for array in inputs])
        request = Request(len(inputs[0]), size_bytes, now, deadline, inputs, run, tell)
        with self._lock:
            self._queue.admit(lane, request)
            if self._idle and self._queue.is_worth_a_slot:
                self._news.notify()
        return request

    def give_up(self, lane: Lane[Request], request: Request) -> None:
        """Do not run what has not started of a request, and tell it so unless it has been told."""
        if request.told:  # as is every request whose call has ended as it should
            return
        with self._lock:
            self._queue.drop(lane, request)
            untold, request.told = not request.told, True
        if untold:
            request.tell(Abandoned("nobody waits for the answer any longer"))

    def seconds(self) -> float:
        """Tell how long it takes to run all that waits."""
        with self._lock:
            return self._queue.seconds

    def _work(self) -> None:
        while self._run_next():  # and nothing is kept of it while there is nothing to do
            pass

    def _run_next(self) -> bool:
        found = self._next()
        if isinstance(found, Batch):
            self._run(found)
        elif found is not None:
            for request in found:
                request.tell(TooLate())
        return found is not None

    def _next(self) -> Batch[Request] | list[Request] | None:
        """Wait for something to run, or for requests that are too late; None at the end.

        Whose deadline is the call's own is mostly told by gRPC before.
        """
        with self._news:
            while not self._closed:
                now = self._clock()
                late = [request for request in self._queue.drop_expired(now) if not request.told]
                if late:
                    for request in late:
                        request.told = True
                    return late
                batch = self._queue.take(now)
                if batch is not None:
                    if self._idle and self._queue.is_worth_a_slot:
                        self._news.notify()
                    return batch
                waiting = self._queue.next_due(now)
                timeout = None if waiting is None else waiting[1] - now
                self._idle += 1
                self._news.wait(timeout and min(max(0.0, timeout), threading.TIMEOUT_MAX))
                self._idle -= 1
        return None

    def _run(self, batch: Batch[Request]) -> None:
        """Run a batch and tell those whose last part it had."""
        parts = [part for part in batch.parts if not part.item.dropped]
        started = self._clock()
        answers = _run(parts)
        ended = self._clock()
        rows = sum([part.rows for part in parts])
        settled: list[tuple[Request, Outcome | Exception]] = []
        with self._lock:
            for part, answer in zip(parts, answers, strict=True):
                request = part.item
                if request.told:
                    continue
                if isinstance(answer, Exception):
                    self._queue.drop(batch.lane, request)
                    settled.append((request, answer))
                    request.told = True
                    continue
                if not request.answers:
                    request.first_run = started
                    request.batch_wait_s = max(0.0, batch.ready - request.arrived)
                request.compute_s += ended - started
                request.batch_rows = max(request.batch_rows, rows)
                request.answers.append(answer)
                if part.stop == request.rows:
                    settled.append((request, _outcome(request)))
                    request.told = True
        for request, end in settled:
            request.tell(end)
        with self._lock:
            self._queue.end(batch, ended - started if parts else None)


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
    if len(parts) == 1:
        return [outputs]
    answers: list[Arrays | Exception] = []
    start = 0
    for part in parts:
        answers.append([output[start : start + part.rows] for output in outputs])
        start += part.rows
    return answers


def _stacked(parts: Sequence[Part[Request]]) -> Arrays:
    if len(parts) == 1 and parts[0].rows == parts[0].item.rows:
        return parts[0].item.inputs
    rows = [[array[p.start : p.stop] for array in p.item.inputs] for p in parts]
    return (
        rows[0]
        if len(rows) == 1
        else [np.concatenate(arrays) for arrays in zip(*rows, strict=True)]
    )


def _outcome(request: Request) -> Outcome:
    answers = request.answers
    return Outcome(
        outputs=answers[0]
        if len(answers) == 1
        else [np.concatenate(arrays) for arrays in zip(*answers, strict=True)],
        batch_rows=request.batch_rows,
        queue_s=request.first_run - request.arrived,
        batch_wait_s=request.batch_wait_s,
        compute_s=request.compute_s,
    )
