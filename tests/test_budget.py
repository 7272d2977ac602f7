"""How many bytes there may be, what counts as some, and who leaves when there are too many."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving import budget, memory
from serving.budget import MESSAGE_COPIES, Budget, default_limit
from serving.errors import StartupError
from serving.pressure import Watch
from serving.room import Endpoint, Room, endpoint_of
from serving.settings import Settings
from tests.servers import served

MIB = 2**20
MACHINE = memory.memory_limit(Path("/nowhere"), Path("/nowhere"))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "1073741824\n"}, 1024 * MIB),
        ("0::/\n", {"memory.max": "max\n"}, MACHINE),
        ("0::/pod/c\n", {"pod/memory.max": f"{512 * MIB}", "pod/c/memory.max": "max"}, 512 * MIB),
        ("0::/pod/c\n", {"pod/memory.max": "max", "pod/c/memory.max": f"{MIB}"}, MIB),
        ("0::/of/host\n", {"memory.max": f"{256 * MIB}\n"}, 256 * MIB),  # seen from a container
        (
            "3:cpu:/\n4:memory:/a/b\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/a/memory.limit_in_bytes": f"{300 * MIB}\n",
                "memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
            },
            300 * MIB,
        ),
        ("4:memory:/a\n", {}, MACHINE),
        ("", {}, MACHINE),
        ("0::/\n", {"memory.max": ""}, MACHINE),
    ],
)
def test_the_memory_limit_is_the_smallest_of_the_groups_around_a_process(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int
) -> None:
    write(tmp_path / "own", groups)
    write(tmp_path / "outside" / "memory.max", "1")  # of no group of this process
    for name, text in files.items():
        write(tmp_path / "groups" / name, text)
    assert memory.memory_limit(tmp_path / "groups", tmp_path / "own") == limit


def test_the_process_says_what_it_holds() -> None:
    before = memory.resident_bytes()
    held = bytearray(b"x") * (64 * MIB)
    after = memory.resident_bytes()
    assert before is not None
    assert after is not None
    assert after - before > 60 * MIB
    assert len(held) == 64 * MIB


@pytest.mark.parametrize(
    ("memory_mib", "workers", "resident_mib", "message_mib", "wanted_mib"),
    [
        (1024, 1, 100, 4, 462),
        (1024, 2, 100, 4, 206),
        (128, 1, 100, 4, 14),
        (128, 1, 120, 4, 12),  # one message in any case
        (64, 1, 100, 64, 192),
    ],
)
def test_by_default_it_is_half_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
    memory_mib: int,
    workers: int,
    resident_mib: int,
    message_mib: int,
    wanted_mib: int,
) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: memory_mib * MIB)
    monkeypatch.setattr(memory, "resident_bytes", lambda: resident_mib * MIB)
    assert default_limit(message_mib * MIB, workers) == wanted_mib * MIB


def test_a_budget_below_one_message_is_refused(repository: Path) -> None:
    """Before models load if both are set; else when it is known how large a message may be."""
    sizes = {"max_message_bytes": 2**20, "max_inflight_bytes": MESSAGE_COPIES * 2**20 - 1}
    with pytest.raises(ValidationError, match=r"expected at least 3145728.*found 3145727; raise"):
        Settings(model_repository=repository, **sizes)  # type: ignore[arg-type]
    with (
        pytest.raises(StartupError, match=r"--max-inflight-bytes: expected at least 201326592"),
        served(repository, max_inflight_bytes=64 * MIB),
    ):
        pass
    with served(repository, max_message_bytes=2**20, max_inflight_bytes=3 * 2**20) as (server, _):
        found = server.registry.get_sample_value("kanserve_inflight_limit_bytes")
        assert found == 3 * 2**20


class Call:
    def __init__(self, connection: str = "ipv4:192.0.2.1:1") -> None:
        self.connection = connection
        self.ended = False

    def give_up(self, *, late: bool) -> None:
        self.ended = True


def test_bytes_count_until_the_answer_is_taken_whatever_happens() -> None:
    held = Budget(100, 50)
    room = Room(8, 5.0, budget=held)
    taken, gone, late, untaken = (Call() for _ in range(4))
    for call in (taken, gone, late, untaken):
        assert room.enter(call)
        assert room.hear(call, 10)
        assert room.hold(call, 20)
    assert held.held == 80
    assert not room.hold(taken, 21)
    assert held.held == 80
    assert room.hold(taken, 15)
    room.answer(taken, 30)
    assert held.held == 90  # the answer in place of the message
    room.answer(untaken, 200)  # answers are there when their size is known
    assert held.is_full
    for call in (gone, gone, taken, untaken, late):
        room.leave(call)
        room.leave(call)
    assert held.held == 0
    assert room.hold(late, 10)  # has left, so that nothing is counted
    room.answer(late, 10)
    assert held.held == 0


class Machine:
    """What a watch measures."""

    def __init__(self) -> None:
        self.grown = 0
        self.received: dict[Endpoint, int] = {}
        self.released = 0
        self.now = 0.0

    def watch(self, held: Budget, *rooms: Room) -> Watch:
        return Watch(
            held, rooms, lambda: self.received, self.resident, self.release, lambda: self.now
        )

    def resident(self) -> int:
        return 10**9 + self.grown

    def release(self) -> bool:
        self.released += 1
        return True

    def bring(self, connection: str, size: int) -> None:
        name = endpoint_of(connection)
        self.received[name] = self.received.get(name, 0) + size
        self.grown += size


@pytest.fixture
def machine() -> Machine:
    return Machine()


def room_of(held: Budget, machine: Machine) -> Room:
    return Room(10_000, 60.0, budget=held, clock=lambda: machine.now)


def enter(room: Room, *connections: str) -> list[Call]:
    calls = [Call(connection) for connection in connections]
    for call in calls:
        assert room.enter(call)
    return calls


def test_calls_that_bring_too_much_before_they_are_whole_end(machine: Machine) -> None:
    held = Budget(400 * MIB, 64 * MIB)
    room = room_of(held, machine)
    watch = machine.watch(held, room)
    small = enter(room, *(f"ipv4:192.0.2.9:{i}" for i in range(1000)))
    machine.now = 1.0
    watch.look()
    assert held.in_transit == 0  # nothing has come, so that any number may wait
    for call in small:
        machine.bring(call.connection, 100)
    large = enter(room, *(f"ipv4:192.0.2.1:{i}" for i in range(40)))
    machine.now = 2.0
    for call in large:
        machine.bring(call.connection, 10 * MIB)
    watch.look()
    ended = sum(call.ended for call in large)
    assert 40 - ended == 19  # half of the budget, with what the small ones have brought
    assert held.in_transit == 190 * MIB + 100_000
    assert not held.is_full
    assert not any(call.ended for call in small)


def test_the_next_call_waits_while_others_may_bring_more_than_there_is_room_for(
    machine: Machine,
) -> None:
    held = Budget(200 * MIB, 64 * MIB)  # three of the largest
    room = room_of(held, machine)
    watch = machine.watch(held, room)
    watch.look()
    machine.now = 1.0
    calls = enter(room, *(f"ipv4:192.0.2.9:{i}" for i in range(2)))
    assert not room.is_held_up
    calls += enter(room, "ipv4:192.0.2.9:2")
    assert room.is_held_up
    assert room.hear(calls[0], 100)  # a small one
    assert not room.is_held_up
    calls += enter(room, "ipv4:192.0.2.9:3")
    assert room.is_held_up
    machine.now = 2.0
    watch.look()  # nothing has come
    assert not room.is_held_up
    machine.now = 3.0
    assert room.hold(calls[0], 130 * MIB)
    enter(room, "ipv4:192.0.2.9:4")
    assert room.is_held_up  # there is room for one


def test_those_of_the_worst_address_end_first(machine: Machine) -> None:
    held = Budget(400 * MIB, 64 * MIB)
    room = room_of(held, machine)
    watch = machine.watch(held, room)
    honest = enter(room, "ipv4:192.0.2.9:1")
    many = enter(room, *(f"ipv4:192.0.2.1:{i}" for i in range(400)))
    machine.now = 1.0
    machine.bring(honest[0].connection, 60 * MIB)
    for call in many:
        machine.bring(call.connection, MIB)
    watch.look()
    assert sum(call.ended for call in many) == 260
    assert not honest[0].ended


def test_bytes_of_whole_messages_are_not_in_transit(machine: Machine) -> None:
    """A connection that has brought gigabytes, and has an idle stream beside, keeps it."""
    held = Budget(100 * MIB, 64 * MIB)
    room = room_of(held, machine)
    watch = machine.watch(held, room)
    (idle,) = enter(room, "ipv4:192.0.2.1:1")
    for _ in range(1000):
        (call,) = enter(room, "ipv4:192.0.2.1:1")
        machine.received[endpoint_of(call.connection)] = (
            machine.received.get(endpoint_of(call.connection), 0) + 2**20 + 64
        )
        assert room.hear(call, 2**20)
        room.leave(call)
    machine.now, machine.grown = 1.0, 99 * MIB  # by what is something else's
    watch.look()
    assert not idle.ended
    assert held.in_transit == 0


def test_headers_of_a_connection_count_no_longer_once_no_call_is_silent(machine: Machine) -> None:
    held = Budget(100 * MIB, 64 * MIB)
    room = room_of(held, machine)
    watch = machine.watch(held, room)
    machine.received[endpoint_of("ipv4:192.0.2.1:1")] = 10**9
    machine.grown = 99 * MIB
    enter(room, "ipv4:192.0.2.2:1")
    machine.now = 1.0
    machine.received[endpoint_of("ipv4:192.0.2.2:1")] = 0
    watch.look()
    (call,) = enter(room, "ipv4:192.0.2.1:1")
    machine.now = 2.0
    watch.look()
    assert not call.ended
    assert held.in_transit == 0


def test_a_message_that_claims_more_than_any_may_have_ends(machine: Machine) -> None:
    held = Budget(400 * MIB, 4 * MIB)
    room = room_of(held, machine)
    watch = machine.watch(held, room)
    honest = enter(room, *(f"ipv4:192.0.2.9:{i}" for i in range(10)))
    (liar,) = enter(room, "ipv4:192.0.2.1:1")
    machine.now = 1.0
    machine.bring(liar.connection, 395 * MIB)
    watch.look()
    assert not liar.ended  # the budget is kept
    machine.bring(liar.connection, 20 * MIB)
    watch.look()
    assert liar.ended
    assert machine.released
    assert not any(call.ended for call in honest)


def test_where_the_kernel_says_nothing_each_call_counts_as_the_largest_message(
    machine: Machine,
) -> None:
    held = Budget(400 * MIB, 64 * MIB)
    room = room_of(held, machine)
    watch = machine.watch(held, room)
    calls = enter(room, *["unix:"] * 10)
    machine.now, machine.grown = 1.0, 201 * MIB
    watch.look()
    assert sum(not call.ended for call in calls) == 3
    assert calls[-1].ended is False  # the oldest leave


def test_answers_that_are_not_taken_leave_when_their_bytes_are_needed(machine: Machine) -> None:
    held = Budget(100, 10)
    room = room_of(held, machine)
    watch = machine.watch(held, room)
    calls = enter(room, "ipv4:192.0.2.1:1", "ipv4:192.0.2.2:1", "ipv4:192.0.2.2:2")
    for call, size in zip(calls, (35, 25, 35), strict=True):
        assert room.hear(call, 1)
        room.answer(call, size)
    machine.now = 0.9
    watch.look()
    assert not any(call.ended for call in calls)
    machine.now = 1.1
    watch.look()
    assert [call.ended for call in calls] == [False, False, True]
    assert held.held == 60


def test_connections_that_are_closed_are_forgotten(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.pressure._SETTLE_EVERY", 1)
    held = Budget(100 * MIB, MIB)
    room = room_of(held, machine)
    watch = machine.watch(held, room)
    for i in range(9000):
        held.hear(f"ipv4:192.0.2.1:{i}", 10)
    machine.received = {endpoint_of("ipv4:192.0.2.1:7"): 10}
    watch.look()
    assert list(held.heard()) == ["ipv4:192.0.2.1:7"]


def test_little_memory_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[dict[str, Any]] = []
    log = type("Log", (), {"warning": lambda self, event, **facts: warnings.append(facts)})()
    monkeypatch.setattr(budget, "_log", log)
    monkeypatch.setattr(memory, "memory_limit", lambda: 10 * MIB)
    default_limit(64 * MIB, 1)
    assert warnings[0]["max_inflight_bytes"] == 192 * MIB
