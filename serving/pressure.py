"""Bytes of messages that are not whole yet, which are in gRPC's memory, and who leaves for them.

gRPC reads a message whole once it is asked for, says nothing before that, and compares its size
with the limit only then: a call that claims four gigabytes is read as far as it comes. So what is
in transit is measured, while the process has grown: what the kernel has received on a connection,
less the messages that came of it. Calls end, those of the worst address first, until the budget is
kept. Where the kernel says nothing, each call counts as the largest message.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from heapq import heappop, heappush

import structlog

from serving import memory
from serving.budget import ENOUGH, Budget
from serving.periodic import repeating
from serving.room import Endpoint, Room, Silent, endpoint_of, network_of

_LOOK_S = 0.01  # a network of 10 Gbit/s brings 12.5 MB in that time
_SLOW_S = 0.01  # a small message comes with its headers, or right behind them
_TAKEN_S = 1.0  # that a client may take for an answer while others need the bytes
_PRESSURE = 0.5  # of the budget, by which the process has grown before connections are measured
_LEFT = 0.5  # of the budget, down to which calls end whose messages are not whole
_LITTLE = 1 / 16  # of the budget, that is never too much for them
_LITTLE_BYTES = 2**25
_UNUSED = 0.125  # of the budget, that may be free and not the system's before it is given back
_RELEASE_S = 0.05  # between two times
_AT_ONCE = 16  # of so many calls of a connection one ends at a time
_PAUSES = 4  # between measurements, as a multiple of the processor's time that one takes
_KNOWN = 8192  # connections, before those that are closed are forgotten
_SETTLE_EVERY = 100  # looks

_log = structlog.get_logger()

Received = Callable[[], Mapping[Endpoint, int]]
"""Returns the bytes that have come on each connection that is open."""


_Place = tuple[Room, Silent]


class Sizes:
    """Bytes by connection, of which the most of the address with the most is found soon.

    Args:
        sizes: Bytes of each connection.

    Attributes:
        total: Of all of them.
    """

    def __init__(self, sizes: Mapping[Endpoint, int]) -> None:
        self.total = 0
        self._of_address: Counter[str] = Counter()
        self._connections: defaultdict[str, list[tuple[int, Endpoint]]] = defaultdict(list)
        for name, size in sizes.items():
            self.put(name, size)

    def put(self, name: Endpoint, size: int) -> None:
        """Add a connection."""
        if size:
            address = network_of(name[0])
            self.total += size
            self._of_address[address] += size
            heappush(self._connections[address], (-size, name))

    def take_worst(self) -> Endpoint:
        """Remove the connection with the most bytes, of the address with the most."""
        address = max(self._of_address, key=self._of_address.__getitem__)
        negative, name = heappop(self._connections[address])
        self.total += negative
        self._of_address[address] += negative
        return name


class Watch:
    """Looks at what is in transit, and ends calls when the budget is spent.

    Args:
        budget: What there may be.
        rooms: Where calls are.
        received: Measures connections.
        resident: Measures the process.
        release: Returns free memory to the system; tells whether it can.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        budget: Budget,
        rooms: Collection[Room],
        received: Received,
        resident: Callable[[], int | None] = memory.resident_bytes,
        release: Callable[[], bool] = memory.release_free_memory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._rooms = rooms
        self._received = received
        self._resident = resident
        self._release = release
        self._clock = clock
        self._base = resident() or 0  # what the process holds when nobody calls
        self._settled: dict[Endpoint, int] = {}  # received and not heard where no call is silent
        self._most_known = _KNOWN
        self._looks = 0
        self._released = -_RELEASE_S

    def look(self) -> None:
        """Measure once, and end calls while there is more than the budget allows."""
        now = self._clock()
        self._measure(now)
        self._budget.measured_at = now

    def _measure(self, now: float) -> None:
        self._looks += 1
        budget = self._budget
        self._end_untaken(now - _TAKEN_S)
        is_any_silent = any(room.is_any_silent(now - _SLOW_S) for room in self._rooms)
        if not is_any_silent and not budget.held:
            budget.in_transit = 0
            if self._looks % _SETTLE_EVERY == 0:
                self._settle()
            return
        grown = self._grown()
        if is_any_silent and grown > _PRESSURE * budget.limit:
            self._end_silent(grown)
        else:
            budget.in_transit = 0
        # What has been freed, and is kept for later in small pieces.
        unused = grown - budget.held - budget.in_transit
        if unused > _UNUSED * budget.limit and now - self._released > _RELEASE_S:
            self._released = now
            self._release()

    def _grown(self) -> float:
        resident = self._resident()
        return float("inf") if resident is None else resident - self._base

    def _settle(self) -> None:
        """Note what the process holds when there is nothing of callers."""
        if self._grown() > _UNUSED * self._budget.limit:
            self._release()
        self._base = self._resident() or 0
        heard = self._budget.heard()
        if len(heard) > self._most_known:
            received = self._received()
            self._budget.forget(name for name in heard if endpoint_of(name) not in received)
            self._most_known = max(_KNOWN, 2 * len(received))

    def _end_silent(self, grown: float) -> None:
        """End calls whose messages take too much before they are whole."""
        budget = self._budget
        silent: defaultdict[Endpoint, list[_Place]] = defaultdict(list)
        for room in self._rooms:
            for call in room.silent_calls():
                silent[endpoint_of(call.connection)].append((room, call))
        # In this order: what comes meanwhile counts as in transit, and its connection is measured.
        heard = {endpoint_of(name): size for name, size in budget.heard().items()}
        received = self._received()
        whole = self._unheard(received, heard, silent)

        def bytes_of(name: Endpoint) -> int:
            most = len(silent[name]) * budget.max_message_bytes
            return max(0, min(whole.get(name, most), most))

        sizes = Sizes({name: bytes_of(name) for name in silent})
        ended: list[_Place] = []
        little = min(_LITTLE * budget.limit, _LITTLE_BYTES)
        # So early that the door opens again: whoever has sent nothing whole keeps nobody out.
        if budget.held + sizes.total > ENOUGH * budget.limit and sizes.total > little:
            enough = max(_LEFT * budget.limit - budget.held, little)
            while sizes.total > enough:
                name = sizes.take_worst()
                count = max(1, len(silent[name]) // _AT_ONCE)  # the oldest
                ended += silent[name][:count]
                del silent[name][:count]
                sizes.put(name, bytes_of(name))
        elif grown > budget.limit and self._release() and self._grown() > budget.limit:
            # A message is larger than any may be, which gRPC sees when it is whole.
            over = Counter({name: whole[name] - bytes_of(name) for name in silent if name in whole})
            for name, size in over.most_common(1):
                if size > 0:
                    ended += silent[name]
        for room, call in ended:
            room.end(call)
        budget.in_transit = sizes.total
        if ended:
            budget.shut()
            _log.warning("calls_ended_for_memory", calls=len(ended))

    def _unheard(
        self,
        received: Mapping[Endpoint, int],
        heard: Mapping[Endpoint, int],
        silent: Collection[Endpoint],
    ) -> dict[Endpoint, int]:
        """Find how many bytes have come on each connection that are of no whole message.

        Frames and headers are among them. They no longer count once no call is silent.
        """
        unheard = {name: size - heard.get(name, 0) for name, size in received.items()}
        self._settled = {
            name: self._settled.get(name, 0) if name in silent else size
            for name, size in unheard.items()
        }
        return {name: size - self._settled[name] for name, size in unheard.items()}

    def _end_untaken(self, before: float) -> None:
        """End calls whose answers are not taken while the bytes are needed."""
        budget = self._budget
        if budget.held <= budget.limit * ENOUGH:
            return
        found: defaultdict[Endpoint, list[_Place]] = defaultdict(list)
        counted: Counter[Endpoint] = Counter()
        for room in self._rooms:
            for call, size in room.untaken(before):
                name = endpoint_of(call.connection)
                found[name].append((room, call))
                counted[name] += size
        sizes = Sizes(counted)
        while sizes.total and budget.held > budget.limit * ENOUGH:
            for room, call in found[sizes.take_worst()]:
                room.end(call)


def watching(watch: Watch) -> AbstractContextManager[None]:
    """Look again and again, from a thread, as long as the block runs."""

    def look() -> float:
        started = time.thread_time()  # not what it waits for others
        watch.look()
        return _PAUSES * (time.thread_time() - started)

    return repeating("budget", look, _LOOK_S)
