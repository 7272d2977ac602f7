"""The batching core on a clock that the tests set."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.batching import Batch, Item, Lane, Limits, Queue, QueueFull, TooLate

NO_LIMIT = 10**9


def limits(
    max_batch_rows: int = 8,
    max_wait_s: float = 0.0,
    max_queue_rows: int = NO_LIMIT,
    max_queue_bytes: int = NO_LIMIT,
) -> Limits:
    return Limits(max_batch_rows, max_wait_s, max_queue_rows, max_queue_bytes)


def item(rows: int, arrived: float = 0.0, deadline: float = math.inf, size_bytes: int = 0) -> Item:
    return Item(rows, size_bytes, arrived, deadline)


def admitted(queue: Queue[Item], lane: Lane[Item], *items: Item) -> None:
    for one in items:
        queue.admit(lane, one)


def shown(batch: Batch[Item] | None) -> list[tuple[Item, int, int]] | None:
    return None if batch is None else [(p.item, p.start, p.stop) for p in batch.parts]


def test_long_requests_run_by_themselves_at_once() -> None:
    queue, lane = Queue[Item](2), of_long_runs()
    a, b = item(1), item(1)
    admitted(queue, lane, a, b)
    assert shown(queue.take(0)) == [(a, 0, 1)]
    assert shown(queue.take(0)) == [(b, 0, 1)]
    assert queue.take(0) is None


def test_short_requests_that_are_there_together_run_together() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_batch_rows=100))
    for rows in (1, 2):
        lane.pace.learn(rows, 1e-4 + 5e-5 * rows)
    items = [item(2) for _ in range(5)]
    admitted(queue, lane, *items)
    # Half a millisecond is eight rows: four requests.
    assert shown(queue.take(0)) == [(one, 0, 2) for one in items[:4]]


def test_requests_of_an_unknown_pace_run_together() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_batch_rows=4))
    items = [item(2) for _ in range(3)]
    admitted(queue, lane, *items)
    assert shown(queue.take(0)) == [(one, 0, 2) for one in items[:2]]


def test_the_wait_starts_with_the_first_request() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_wait_s=2))
    a, b = item(1, arrived=10), item(2, arrived=11.5)
    admitted(queue, lane, a, b)
    assert queue.take(11.9) is None
    assert queue.next_due(11.9) == (a, 12)
    assert shown(queue.take(12)) == [(a, 0, 1), (b, 0, 2)]


def test_a_full_batch_does_not_wait() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_batch_rows=4, max_wait_s=100))
    a, b = item(1), item(3)
    admitted(queue, lane, a)
    assert queue.take(0) is None
    admitted(queue, lane, b)
    assert shown(queue.take(0)) == [(a, 0, 1), (b, 0, 3)]


def test_who_has_expired_is_given_up_at_the_head_of_a_line() -> None:
    queue, lane, other = Queue[Item](1), Lane[Item](limits()), Lane[Item](limits())
    early, late, later = item(1, deadline=1), item(2, deadline=3), item(4, deadline=2)
    admitted(queue, lane, early, late, later)
    admitted(queue, other, elsewhere := item(8, deadline=1))
    assert queue.drop_expired(0.9) == []
    assert queue.drop_expired(1) == [early, elsewhere]
    assert (lane.rows, other.rows) == (6, 0)
    assert queue.drop_expired(2) == []  # not at the head
    assert shown(queue.take(2)) == [(late, 0, 2)]
    assert queue.drop_expired(2) == [later]
    assert not queue


def of_long_runs(**changed: Any) -> Lane[Item]:
    """A lane whose runs of one row take half a second."""
    lane = Lane[Item](limits(**changed))
    lane.pace.learn(1, 0.5)
    return lane


def test_requests_that_fit_into_a_run_stay_whole() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_batch_rows=4, max_wait_s=100))
    a, b = item(3), item(3)
    admitted(queue, lane, a, b)
    assert shown(queue.take(0)) == [(a, 0, 3)]


def test_a_request_too_large_runs_in_parts_with_others_between() -> None:
    queue, lane = Queue[Item](2), Lane[Item](limits(max_batch_rows=4))
    large, small = item(10), item(1)
    admitted(queue, lane, large, small)
    first = queue.take(0)
    assert first is not None
    assert shown(first) == [(large, 0, 4)]
    second = queue.take(0)
    assert second is not None
    assert shown(second) == [(small, 0, 1)]
    assert queue.take(0) is None  # its parts run one after the other
    queue.end(first, 1)
    third = queue.take(1)
    assert third is not None
    assert shown(third) == [(large, 4, 8)]
    queue.end(third, 1)
    assert shown(queue.take(2)) == [(large, 8, 10)]


def test_no_rows_are_a_run_too() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits())
    nothing = item(0)
    admitted(queue, lane, nothing)
    assert shown(queue.take(0)) == [(nothing, 0, 0)]


def test_slots_bound_what_runs() -> None:
    queue, lane = Queue[Item](1), of_long_runs()
    a, b = item(1), item(1)
    admitted(queue, lane, a, b)
    running = queue.take(0)
    assert running is not None
    assert queue.take(0) is None
    assert queue.next_due(0) is None
    queue.end(running, 1)
    assert shown(queue.take(1)) == [(b, 0, 1)]


def test_what_follows_a_short_run_soon_is_not_worth_another_slot() -> None:
    queue, lane = Queue[Item](3), Lane[Item](limits(max_batch_rows=100))
    for rows in (1, 2):
        lane.pace.learn(rows, 1e-4 + 5e-5 * rows)
    admitted(queue, lane, item(1))
    assert queue.is_worth_a_slot  # nothing runs
    short = queue.take(0)
    assert short is not None
    assert not queue.is_worth_a_slot  # nobody is in line
    admitted(queue, lane, item(1))
    assert not queue.is_worth_a_slot
    admitted(queue, lane, item(8))  # together more than half a millisecond
    assert queue.is_worth_a_slot
    others = queue.take(0), queue.take(0)
    admitted(queue, lane, item(1))
    assert not queue.is_worth_a_slot  # the line is short again
    for batch in (short, *others):
        assert batch is not None
        queue.end(batch, 1e-4)
    assert queue.is_worth_a_slot


def test_what_follows_a_run_of_unknown_length_is_worth_another_slot() -> None:
    queue, lane = Queue[Item](2), Lane[Item](limits())
    admitted(queue, lane, item(1))
    queue.take(0)
    admitted(queue, lane, item(1))
    assert queue.is_worth_a_slot


def test_lanes_take_turns_and_never_share_a_run() -> None:
    queue, busy, quiet = Queue[Item](1), of_long_runs(), of_long_runs()
    many, one = [item(1) for _ in range(3)], item(1)
    admitted(queue, busy, *many)
    admitted(queue, quiet, one)
    order = []
    while (batch := queue.take(0)) is not None:
        order += [part.item for part in batch.parts]
        queue.end(batch, 1)
    assert order == [many[0], one, many[1], many[2]]


def test_a_queue_that_is_full_says_when_there_is_room_again() -> None:
    queue, lane = Queue[Item](2), of_long_runs(max_queue_rows=5)
    running = item(1), item(1)
    admitted(queue, lane, *running)
    for _ in running:
        assert queue.take(0) is not None
    admitted(queue, lane, *(item(1) for _ in range(4)))
    with pytest.raises(QueueFull) as refused:
        queue.admit(lane, item(2))
    # Two of the four rows that wait must go, and two run at a time, half a second each.
    assert refused.value.retry_after_s == pytest.approx(0.5)


def test_bytes_fill_a_queue_too() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_queue_bytes=100))
    admitted(queue, lane, item(1, size_bytes=60))
    with pytest.raises(QueueFull):
        queue.admit(lane, item(1, size_bytes=50))
    admitted(queue, lane, item(1, size_bytes=40))


def test_what_runs_takes_room_until_it_ends() -> None:
    """So the last of those let in is answered within the time that the limit's rows take."""
    queue, lane = Queue[Item](1), of_long_runs(max_queue_rows=4)
    admitted(queue, lane, item(2), item(1))
    batch = queue.take(0)
    assert batch is not None
    assert batch.rows == 2
    with pytest.raises(QueueFull):
        queue.admit(lane, item(2))
    admitted(queue, lane, item(1))
    queue.end(batch, 1.0)
    admitted(queue, lane, item(2))


def test_runs_in_other_slots_take_no_room() -> None:
    queue, lane = Queue[Item](3), of_long_runs(max_queue_rows=4)
    for _ in range(3):
        admitted(queue, lane, item(2))
        assert queue.take(0) is not None
    admitted(queue, lane, item(1), item(1))
    with pytest.raises(QueueFull):
        queue.admit(lane, item(1))


def test_an_empty_queue_has_room_for_anything() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_queue_rows=4, max_queue_bytes=100))
    admitted(queue, lane, item(1000, size_bytes=1000))


def test_who_cannot_be_answered_in_time_is_refused_at_once() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits())
    for rows in (1, 2, 3, 4):
        lane.pace.learn(rows, 0.1 * rows)
    with pytest.raises(TooLate):
        queue.admit(lane, item(4, arrived=5, deadline=5.3))
    admitted(queue, lane, item(4, arrived=5, deadline=5.5))
    with pytest.raises(QueueFull) as refused:  # would have to wait for the other
        queue.admit(lane, item(2, arrived=5, deadline=5.5))
    assert refused.value.retry_after_s == pytest.approx(0.1)
    with pytest.raises(TooLate):
        queue.admit(lane, item(1, arrived=5, deadline=5))


def test_what_is_not_known_yet_is_taken_for_fast() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_batch_rows=NO_LIMIT))
    admitted(queue, lane, item(1000, deadline=1e-6))
    lane.pace.learn(1, 0.001)  # says nothing of a thousand rows but that they take no less
    admitted(queue, lane, item(1000, deadline=0.01))


def test_nothing_expired_runs() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_wait_s=10))
    expired, alive = item(1, deadline=3), item(1)
    admitted(queue, lane, expired, alive)
    assert shown(queue.take(10)) == [(alive, 0, 1)]


def test_a_batch_starts_early_enough_for_its_most_urgent_request() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_wait_s=10))
    a, urgent = item(1), item(1, deadline=6)
    lane.pace.learn(2, 1.0)
    admitted(queue, lane, a, urgent)
    assert queue.next_due(0) == (a, 5)
    assert shown(queue.take(5)) == [(a, 0, 1), (urgent, 0, 1)]


def test_who_is_dropped_leaves_the_others_as_they_were() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_batch_rows=4, max_wait_s=10))
    a, gone, b = item(1), item(2), item(3)
    admitted(queue, lane, a, gone)
    queue.drop(lane, gone)
    admitted(queue, lane, b)
    assert shown(queue.take(0)) == [(a, 0, 1), (b, 0, 3)]


def test_a_dropped_request_starts_no_further_part() -> None:
    queue, lane = Queue[Item](1), Lane[Item](limits(max_batch_rows=4))
    large = item(10)
    admitted(queue, lane, large)
    first = queue.take(0)
    assert first is not None
    queue.drop(lane, large)
    queue.end(first, 1)
    assert queue.take(1) is None


@dataclass(eq=False)
class Told(Item):
    """Remembers what was run of it."""

    lane: Lane["Told"]
    ran: list[tuple[int, int]] = field(default_factory=list)


class AnySequence(RuleBasedStateMachine):
    """Whatever happens in whatever order: every row that is wanted runs once, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.queue = Queue[Told](2)
        self.lanes = [
            Lane[Told](limits(max_batch_rows=4)),
            Lane[Told](limits(max_batch_rows=6, max_wait_s=2.0)),
        ]
        self.items: list[Told] = []
        self.running: list[Batch[Told]] = []

    @rule(
        rows=st.integers(0, 15),
        lane=st.sampled_from([0, 1]),
        life=st.sampled_from([1.0, 5.0, math.inf]),
    )
    def arrive(self, rows: int, lane: int, life: float) -> None:
        one = Told(rows, rows, self.now, self.now + life, self.lanes[lane])
        try:
            self.queue.admit(one.lane, one)
        except (QueueFull, TooLate):
            return
        self.items.append(one)

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take(self) -> None:
        batch = self.queue.take(self.now)
        if batch is None:
            return
        self.running.append(batch)
        assert len(self.running) <= 2
        assert batch.rows <= batch.lane.limits.max_batch_rows
        for part in batch.parts:
            assert part.item.lane is batch.lane
            assert part.item.deadline > self.now
            assert not part.item.dropped
            part.item.ran.append((part.start, part.stop))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.queue.end(batch, 0.01)

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.items))
        self.queue.drop(one.lane, one)

    @invariant()
    def rows_run_once_and_in_order(self) -> None:
        for one in self.items:
            assert [start for start, _ in one.ran] == [0, *(stop for _, stop in one.ran)][
                : len(one.ran)
            ]

    def teardown(self) -> None:
        for _ in range(10_000):
            self.now += 3.0
            while (batch := self.queue.take(self.now)) is not None:
                self.running.append(batch)
                for part in batch.parts:
                    part.item.ran.append((part.start, part.stop))
            if not self.running:
                break
            self.queue.end(self.running.pop(), 0.01)
        for one in self.items:
            if not one.dropped and one.deadline == math.inf:
                assert one.ran[-1][1] == one.rows
                assert sum(stop - start for start, stop in one.ran) == one.rows


TestAnySequence = AnySequence.TestCase
