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
import structlog
from numpy.typing import NDArray

from serving.batching import Batch, Item, Lane, Part, Queue, TooLate

_STALLED_S = 10.0  # without a run, though a slot is free and requests wait
_HUNG_S = 600.0  # the same while runs are under way, of which some take minutes

_log = structlog.get_logger()

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

    Attributes:
        has_work: Whether something has been left to `run_short`.
    """

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._queue: Queue[Request] = Queue(slots)
        self.has_work = False
        self._idle = 0
        self._running = 0
        self._progress_at = clock()
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
        *,
        by_caller: bool = False,
    ) -> Request:
        """Have one request run: by itself, with others or in parts, as its lane's limits say.

        Args:
            lane: Where it waits; always the same for the same engine.
            run: The engine.
            inputs: One array per input, (rows, ...).
            timeout_s: How long its answer is wanted, in seconds.
            tell: Told the answer, what the engine raised for these rows, Abandoned, or TooLate.
            by_caller: Whether this thread calls `run_short` soon.

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
            if by_caller:
                self.has_work = True
            else:
                self._wake()
        return request

    def run_short(self) -> None:
        """Run what waits in this thread, where it ends soon; threads run the rest.

        A thread that is woken for a run of 100 us costs as much as the run.
        """
        self.has_work = False
        with self._lock:
            batch = self._begin(self._clock(), only_short=True)
            self._wake()
        if batch is not None:
            self._run(batch)
            with self._lock:
                self.has_work = bool(self._queue)  # which no thread was woken for

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

    @property
    def is_stalled(self) -> bool:
        """Whether requests wait, and nothing has run for so long that something must be wrong."""
        with self._lock:
            since = self._queue.waiting_since
            if since is None:
                return False
            limit_s = _HUNG_S if self._running else _STALLED_S
            return self._clock() - max(since, self._progress_at) > limit_s

    def _work(self) -> None:
        going = True
        while going:  # and nothing is kept of a run while there is nothing to do
            try:
                going = self._run_next()
            except BaseException as error:  # without this thread, requests would wait for ever
                _log.error("engine_thread_failed", exc_info=error)

    def _run_next(self) -> bool:
        found = self._next()
        if isinstance(found, Batch):
            self._run(found)
        elif found is not None:
            for request in found:
                _complete(request, TooLate())
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
                batch = self._begin(now)
                if batch is not None:
                    self._wake()
                    return batch
                waiting = self._queue.next_due(now)
                timeout = None if waiting is None else waiting[1] - now
                self._idle += 1
                self._news.wait(timeout and min(max(0.0, timeout), threading.TIMEOUT_MAX))
                self._idle -= 1
        return None

    def _begin(self, now: float, *, only_short: bool = False) -> Batch[Request] | None:
        """Take what is to run now, if there is something and a slot; the lock is held."""
        batch = self._queue.take(now, only_short=only_short)
        if batch is not None:
            self._running += 1
            self._progress_at = now
        return batch

    def _wake(self) -> None:
        """Wake a thread if it has something to do; the lock is held."""
        if self._idle and self._queue.is_worth_a_slot:
            self._news.notify()

    def _run(self, batch: Batch[Request]) -> None:
        """Run a batch and complete the requests that had their last part in it."""
        parts = [part for part in batch.parts if not part.item.dropped]
        started = self._clock()
        seconds = None
        try:
            answers = _run(parts)
            seconds = self._clock() - started if parts else None
            completed = self._take(batch, parts, answers, started, seconds or 0.0)
        except BaseException as error:  # no request may wait for ever, and no slot be lost
            _log.error("run_failed", exc_info=error)
            completed = self._fail(batch.lane, parts, RuntimeError(f"{type(error).__name__}"))
        finally:
            with self._lock:
                self._running -= 1
                self._progress_at = self._clock()
        for request, end in completed:
            _complete(request, end)
        with self._lock:
            self._queue.end(batch, seconds)

    def _take(
        self,
        batch: Batch[Request],
        parts: Sequence[Part[Request]],
        answers: Sequence[Arrays | Exception],
        started: float,
        seconds: float,
    ) -> list[tuple[Request, Outcome | Exception]]:
        """Add answers to their requests; return those that are complete."""
        rows = sum([part.rows for part in parts])
        completed: list[tuple[Request, Outcome | Exception]] = []
        with self._lock:
            for part, answer in zip(parts, answers, strict=True):
                request = part.item
                if request.told:
                    continue
                if isinstance(answer, Exception):
                    self._queue.drop(batch.lane, request)
                    completed.append((request, answer))
                    request.told = True
                    continue
                if not request.answers:
                    request.first_run = started
                    request.batch_wait_s = max(0.0, batch.ready - request.arrived)
                request.compute_s += seconds
                request.batch_rows = max(request.batch_rows, rows)
                request.answers.append(answer)
                if part.stop == request.rows:
                    completed.append((request, _outcome(request)))
                    request.told = True
        return completed

    def _fail(
        self, lane: Lane[Request], parts: Sequence[Part[Request]], error: Exception
    ) -> list[tuple[Request, Outcome | Exception]]:
        """Drop what is left of requests; return those that have no answer yet."""
        failed: list[tuple[Request, Outcome | Exception]] = []
        with self._lock:
            for part in parts:
                self._queue.drop(lane, part.item)
                if not part.item.told:
                    part.item.told = True
                    failed.append((part.item, error))
        return failed


def _complete(request: Request, end: Outcome | Exception) -> None:
    """Deliver the end of a request. What its callback raises harms neither thread nor others."""
    try:
        request.tell(end)
    except BaseException as error:
        _log.error("answer_not_delivered", exc_info=error)


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
