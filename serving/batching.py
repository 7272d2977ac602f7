"""The batching core: what is taken in, what runs next and with whom, and what is given up.

No I/O, no threads, no clock: time is an argument, in seconds of whatever clock the caller keeps to,
and the caller holds a lock. Requests wait in a lane, one for each version of a model, so that a run
never mixes versions. Lanes with something to run take turns. Within one, first come, first served;
only a request that is too large for one run goes to the end of the line after each part of it, so
that others need not wait for all of it.

Whoever is refused because of how long runs take (serving/pace.py) must truly have had no chance, so
what is not known yet is taken for fast.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from serving.pace import Pace

_FULL = 0.85
"""Of the room, from when on requests are refused before their messages are read. The rest is for
those on their way in: refused later, they would have cost the reading, and let in, they are
answered within the time that the whole room takes. With 0.95 the 99th percentile was up to a tenth
above it (`python -m benchmarks.stress overload`)."""

_TOGETHER_S = 5e-4
"""How long a run may become by taking in requests that need not wait for it. What a run costs
beside its rows, some 50 us of Python, is nothing to a longer one, and who is in a run gets an
answer only when all do.

It is also how short runs may be that need no second slot: threads that come out of such runs all
the time wait for Python's lock more than they gain."""


class QueueFull(Exception):
    """There is no room, or none that leaves time to run.

    Args:
        retry_after_s: When there will be, as far as can be told.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full for another {retry_after_s:.3g} s")
        self.retry_after_s = retry_after_s


class TooLate(Exception):
    """A run takes longer than the request can wait for its answer."""


@dataclass(frozen=True)
class Limits:
    """What the requests of a lane may ask for.

    Args:
        max_batch_rows: Most rows in one run.
        max_wait_s: How long the first request of a batch waits for others, counted from its
            arrival. With 0 nobody waits for company; short requests that are in line together run
            together all the same.
        max_queue_rows: Most rows that wait, with those of a run, for others to be let in. Where
            nobody waits there is room for a request of any size.
        max_queue_bytes: The same for bytes.
    """

    max_batch_rows: int
    max_wait_s: float
    max_queue_rows: int
    max_queue_bytes: int


@dataclass(eq=False)
class Item:
    """A request: some rows to be run.

    Args:
        rows: How many. None at all is a run, too.
        size_bytes: What they take.
        arrived: When they came.
        deadline: From when on nobody wants the answer.
    """

    rows: int
    size_bytes: int
    arrived: float
    deadline: float
    started: int = field(default=0, init=False)
    """Rows that run or have run."""
    dropped: bool = field(default=False, init=False)
    """Whether the rest is not wanted any longer."""

    @property
    def left(self) -> int:
        """Rows that have not started."""
        return self.rows - self.started


AnyItem = TypeVar("AnyItem", bound=Item)


class Part(NamedTuple, Generic[AnyItem]):
    """Rows `start` to `stop` of an item."""

    item: AnyItem
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True)
class Batch(Generic[AnyItem]):
    """What is run at once: at least one part."""

    lane: "Lane[AnyItem]"
    parts: Sequence[Part[AnyItem]]
    ready: float
    """From when on nobody else was waited for, only a slot."""
    rows: int
    """Of all parts."""
    size_bytes: int
    """Of all requests that have a part in it."""
    is_short: bool
    """Whether it is known to end soon."""


class Lane(Generic[AnyItem]):
    """The line before one version of a model.

    Args:
        limits: What is let in.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pace = Pace()
        self._line: deque[AnyItem] = deque()
        self._rows = 0
        self._size_bytes = 0
        self._runs = 0
        self._running_rows = 0
        self._running_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._line)

    @property
    def rows(self) -> int:
        """Rows in line."""
        return self._rows

    @property
    def is_full(self) -> bool:
        """Whether there is hardly any room left."""
        if not self._line:
            return False
        limits = self.limits
        rows, size_bytes = self._held
        return rows >= _FULL * limits.max_queue_rows or size_bytes >= _FULL * limits.max_queue_bytes

    @property
    def _held(self) -> tuple[int, int]:
        """Rows and bytes, in line and in one of the runs.

        Who comes last waits for the line and for a run to end, so that an answer comes within the
        time that so many rows take. Other runs do not count: what slots do is no reason to refuse.
        """
        if not self._runs:
            return self._rows, self._size_bytes
        return self._rows + self._running_rows // self._runs, (
            self._size_bytes + self._running_bytes // self._runs
        )

    @property
    def seconds(self) -> float:
        """How long it takes to run what is in line."""
        runs = -(-self._rows // self.limits.max_batch_rows)
        if not self.limits.max_wait_s:
            together = max(self.pace.rows_within(_TOGETHER_S), 1.0)
            runs = max(runs, min(len(self._line), math.ceil(self._rows / together)))
        return self.pace.expect(self._rows, runs)

    def excess(self, item: AnyItem) -> float:
        """Tell which share of the line must be gone before an item has room; 0 if it has now."""
        if not self._line:
            return 0.0
        rows, size = self._held
        rows += item.left - self.limits.max_queue_rows
        size += item.size_bytes - self.limits.max_queue_bytes
        if rows <= 0 and size <= 0:
            return 0.0
        share = max(rows / max(self._rows, 1), size / max(self._size_bytes, 1))
        return min(share, 1.0)

    def expired(self, now: float) -> AnyItem | None:
        """Tell whose time has passed at the head of the line. Others get there, or run."""
        return self._line[0] if self._line and self._line[0].deadline <= now else None

    @property
    def waiting_since(self) -> float | None:
        """When the request at the head of the line arrived; None if the line is empty."""
        return self._line[0].arrived if self._line else None

    def enter(self, item: AnyItem) -> None:
        """Put an item at the end of the line."""
        self._line.append(item)
        self._rows += item.left
        self._size_bytes += item.size_bytes

    def leave(self, item: AnyItem) -> None:
        """Take an item out of the line, wherever it stands, if it does."""
        if self._line and self._line[0] is item:
            self._line.popleft()
        elif item in self._line:
            self._line.remove(item)
        else:
            return
        self._rows -= item.left
        self._size_bytes -= item.size_bytes

    def begin(self, batch: Batch[AnyItem]) -> None:
        """Count what runs now."""
        self._runs += 1
        self._running_rows += batch.rows
        self._running_bytes += batch.size_bytes

    def end(self, batch: Batch[AnyItem]) -> None:
        """Count it no longer."""
        self._runs -= 1
        self._running_rows -= batch.rows
        self._running_bytes -= batch.size_bytes

    def next_parts(self, now: float) -> tuple[list[Part[AnyItem]], float]:
        """Tell what would run together next, and when it is to run at the latest."""
        most, wait_s = self.limits.max_batch_rows, self.limits.max_wait_s
        fitting = most if wait_s else min(most, self.pace.rows_within(_TOGETHER_S))
        parts: list[Part[AnyItem]] = []
        rows, due, deadline = 0, math.inf, math.inf
        for item in self._line:
            if item.deadline <= now:
                continue  # it has not been dropped yet
            left = item.rows - item.started
            if parts and rows + left > fitting:  # requests that fit into a run stay whole
                return parts, -math.inf
            taken = min(left, most)
            parts.append(Part(item, item.started, item.started + taken))
            rows += taken
            if rows >= most:
                return parts, -math.inf
            if wait_s:
                due = min(due, item.arrived)
                deadline = min(deadline, item.deadline)
        if not wait_s and parts:
            return parts, -math.inf
        return parts, min(due + wait_s, deadline - self.pace.expect(rows))


class Queue(Generic[AnyItem]):
    """All lanes, and how many runs there may be at a time.

    Args:
        slots: Runs at a time.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._free = slots
        self._short = 0  # runs that will end soon
        self._lanes: deque[Lane[AnyItem]] = deque()  # with somebody in line; the next to take first

    @property
    def seconds(self) -> float:
        """How long it takes to run all that is in line."""
        return sum(lane.seconds for lane in self._lanes) / self._slots

    @property
    def waiting_since(self) -> float | None:
        """When the first of the requests arrived that are at the head of a line."""
        waiting = (lane.waiting_since for lane in self._lanes)
        return min((since for since in waiting if since is not None), default=None)

    def __bool__(self) -> bool:
        """Whether anybody is in line."""
        return bool(self._lanes)

    @property
    def is_worth_a_slot(self) -> bool:
        """Whether another slot should be taken, if there is one, for what is in line.

        It should not where a run that soon ends can be followed by all of it, soon done as well.
        """
        return bool(self._lanes) and (
            not self._short or sum(lane.seconds for lane in self._lanes) > _TOGETHER_S
        )

    def admit(self, lane: Lane[AnyItem], item: AnyItem) -> None:
        """Take in a request that arrives now.

        Raises:
            QueueFull: There is no room, or its deadline passes before all others have run.
            TooLate: Its deadline passes even if it runs at once.
        """
        spare = item.deadline - item.arrived
        excess = lane.excess(item)
        if excess or spare < math.inf:
            runs = max(1, -(-item.rows // lane.limits.max_batch_rows))
            spare -= lane.pace.expect(item.rows, runs)
            if spare <= 0:
                raise TooLate
            # When what runs now will end is not known, and lanes take turns: neither is counted.
            wait = lane.seconds / self._slots
            if excess or wait > spare:
                raise QueueFull(max(excess * wait, wait - spare))
        self._enter(lane, item)

    def take(self, now: float, *, only_short: bool = False) -> Batch[AnyItem] | None:
        """Take what is to run now out of line, if there is a slot; `end` gives the slot back.

        Args:
            now: The time.
            only_short: Whether to take nothing but what is known to end soon.
        """
        for _ in range(len(self._lanes) if self._free else 0):
            lane = self._lanes[0]
            self._lanes.rotate(-1)
            parts, due = lane.next_parts(now)
            if parts and due <= now:
                rows = sum([part.rows for part in parts])
                expected_s = lane.pace.expect(rows)
                is_short = 0 < expected_s <= _TOGETHER_S
                if only_short and not is_short:
                    continue
                for part in parts:
                    self._leave(lane, part.item)
                    part.item.started = part.stop
                ready = -math.inf
                if lane.limits.max_wait_s:  # if not due, then full, with the last that came
                    ready = max(due, max(part.item.arrived for part in parts))
                size_bytes = sum([part.item.size_bytes for part in parts])
                batch = Batch(lane, parts, ready, rows, size_bytes, is_short)
                self._free -= 1
                self._short += batch.is_short
                lane.begin(batch)
                return batch
        return None

    def next_due(self, now: float) -> tuple[AnyItem, float] | None:
        """Tell when `take` will have something though nothing else happens, and for whom."""
        waits = [lane.next_parts(now) for lane in self._lanes] if self._free else []
        due = [(parts[0].item, at) for parts, at in waits if parts]
        return min(due, key=lambda found: found[1], default=None)

    def drop_expired(self, now: float) -> list[AnyItem]:
        """Give up whoever stands at the head of a line though its time has passed."""
        found = [(lane, item) for lane in self._lanes if (item := lane.expired(now)) is not None]
        for lane, item in found:
            self.drop(lane, item)
        return [item for _, item in found]

    def drop(self, lane: Lane[AnyItem], item: AnyItem) -> None:
        """Give up what has not started of a request. Others are not touched by it."""
        item.dropped = True
        self._leave(lane, item)

    def end(self, batch: Batch[AnyItem], seconds: float | None) -> None:
        """Give back a batch's slot, and put what is left of its requests in line.

        Args:
            batch: From `take`.
            seconds: How long it ran; None if it did not.
        """
        self._free += 1
        self._short -= batch.is_short
        batch.lane.end(batch)
        if seconds is not None:
            batch.lane.pace.learn(batch.rows, seconds)
        for part in batch.parts:
            if part.item.left and not part.item.dropped:
                self._enter(batch.lane, part.item)

    def _enter(self, lane: Lane[AnyItem], item: AnyItem) -> None:
        if not lane:
            self._lanes.append(lane)
        lane.enter(item)

    def _leave(self, lane: Lane[AnyItem], item: AnyItem) -> None:
        lane.leave(item)
        if not lane and lane in self._lanes:
            self._lanes.remove(lane)
