"""Room for calls: how many there may be, and who must leave when there is none.

A call whose message is not there costs its sender nothing, so it never keeps another out: one of
the connection with the most of them leaves for the next. What lasts as long as its client likes,
streams and watches, is limited for each peer as well. This module knows gRPC only by the names that
it gives to connections.
"""

import ipaddress
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import islice
from typing import Protocol
from urllib.parse import unquote

from serving.budget import Budget
from serving.periodic import repeating

_LOOK_S = 0.5
_AT_THE_END_S = 1.0  # that a call may take to send its message while the server stops
_IPV6_PREFIX = 64  # the addresses of one household or one machine
_AT_ONCE = 16  # of so many places one is emptied at a time, because to choose takes a while


Endpoint = tuple[str, str]
"""Address and port of the other side of a connection."""


class Silent(Protocol):
    """A call whose message is not there yet, or whose answer is not taken."""

    @property
    def connection(self) -> str:
        """Its connection, as gRPC names it; see `peer_of`."""

    def give_up(self, *, late: bool) -> None:
        """End it.

        Args:
            late: Whether it has had its time; if not, its place is needed.
        """


class Room:
    """Room for calls of one message. Safe to call from several threads.

    Two of gRPC's servers never share one: to end a call takes its server's lock, and the thread
    that makes room holds that of its own.

    Args:
        most: Calls at a time.
        patience_s: How long one may take to send its message, in seconds.
        most_silent: Calls at a time whose messages are not there, each of which may take as much
            memory as the largest message; as many as `most` if None.
        budget: Counts the bytes of the calls; None if nothing does.
        clock: Seconds, never going back.

    Attributes:
        most: As above.
        patience_s: As above.
        most_silent: As above.
        is_closing: Whether calls have to hurry, because the server stops.
    """

    def __init__(
        self,
        most: int,
        patience_s: float,
        most_silent: int | None = None,
        budget: Budget | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self.patience_s = patience_s
        self.is_closing = False
        self.most_silent = most_silent or most
        self._clock = clock
        self._silent: dict[Silent, float] = {}  # and since when, the oldest first
        self._heard: set[Silent] = set()
        self._answered: dict[Silent, float] = {}  # and since when
        self._budget = budget
        self._bytes: dict[Silent, int] = {}  # that the budget counts
        self._lock = threading.Lock() if budget is None else budget.lock

    def __len__(self) -> int:
        """Count the calls that are here."""
        return len(self._silent) + len(self._heard) + len(self._answered)

    @property
    def silent(self) -> int:
        """Count the calls whose messages are not there."""
        return len(self._silent)

    @property
    def is_crowded(self) -> bool:
        """Whether a call whose message is not there must leave for the next one."""
        return len(self._silent) >= self.most_silent

    @property
    def is_held_up(self) -> bool:
        """Whether the next call should wait until it is known what others have brought.

        As many calls as the budget has room for the largest messages are read between two
        measurements; those before them count with what was measured.
        """
        budget = self._budget
        if budget is None or not self._silent or len(self._silent) < budget.most_messages:
            return False
        with self._lock:
            newest = islice(reversed(self._silent.values()), max(1, budget.most_messages))
            return all(since > budget.measured_at for since in newest)

    def enter(self, call: Silent) -> bool:
        """Take a call in whose message is not there; tell whether there is room for it."""
        leaving: list[Silent] = []
        with self._lock:
            if len(self._silent) >= self.most_silent:
                leaving = _choose(self._silent, call, self.most)
            elif len(self) >= self.most:
                leaving = _choose({**self._silent, **self._answered}, call, self.most)
                if not leaving:
                    return False
            for each in leaving:
                self._remove(each)
            self._silent[call] = self._clock()
        for each in leaving:
            each.give_up(late=False)
        return True

    def hear(self, call: Silent, size: int = 0) -> bool:
        """Note that a call's message is there; tell whether the call is still here.

        Args:
            call: As it entered.
            size: Bytes of the message, as it was sent.
        """
        connection = call.connection if size else ""
        with self._lock:
            if size and self._budget is not None:
                self._budget.hear(connection, size)
            if self._silent.pop(call, None) is None:
                return False
            self._heard.add(call)
        return True

    def note(self, call: Silent, size: int) -> None:
        """Note that so many bytes of a connection are those of a whole message."""
        connection = call.connection
        if self._budget is not None:
            with self._lock:
                self._budget.hear(connection, size)

    def hold(self, call: Silent, size: int, *, always: bool = False) -> bool:
        """Count bytes of a call whose message is there; tell whether the budget has room for them.

        Args:
            call: As it entered. If it has left, nothing is counted.
            size: Bytes, beside those that are counted already.
            always: Whether they are counted in any case.
        """
        if self._budget is None:
            return True
        with self._lock:
            if call in self._heard:
                if not self._budget.take(size, always=always):
                    return False
                self._bytes[call] = self._bytes.get(call, 0) + size
        return True

    def answer(self, call: Silent, size: int = 0) -> None:
        """Note that a call has its answer, which its client has yet to take.

        Args:
            call: As it entered.
            size: Bytes of the answer, which are counted in place of those of the message.
        """
        with self._lock:
            if call in self._heard:  # it has not left
                self._heard.discard(call)
                self._answered[call] = self._clock()
                self._give_back(call)
                if self._budget is not None and size:
                    self._budget.take(size, always=True)
                    self._bytes[call] = size

    def leave(self, call: Silent) -> None:
        """Let a call go. It has no effect the second time."""
        with self._lock:
            self._remove(call)

    def is_any_silent(self, before: float) -> bool:
        """Tell whether a call has sent no message that has been here since before some time."""
        with self._lock:
            oldest = next(iter(self._silent.values()), None)
        return oldest is not None and oldest <= before

    def silent_calls(self) -> list[Silent]:
        """List the calls whose messages are not there, the oldest first."""
        with self._lock:
            return list(self._silent)

    def untaken(self, before: float) -> list[tuple[Silent, int]]:
        """List calls, each with its bytes, that have had their answers since before some time."""
        with self._lock:
            return [
                (call, self._bytes.get(call, 0))
                for call, since in self._answered.items()
                if since <= before
            ]

    def end(self, call: Silent) -> None:
        """End a call, unless its message is there by now, or its answer has been taken."""
        with self._lock:
            if call not in self._silent and call not in self._answered:
                return
            self._remove(call)
        call.give_up(late=False)

    def end_late(self) -> None:
        """End the calls that have taken too long to send a message, or to take an answer."""
        late = []
        with self._lock:
            patience_s = min(self.patience_s, _AT_THE_END_S) if self.is_closing else self.patience_s
            before = self._clock() - patience_s
            for calls in (self._silent, self._answered):
                for call, since in calls.items():
                    if since > before:
                        break
                    late.append(call)
            for call in late:
                self._remove(call)
        for call in late:
            call.give_up(late=True)

    def close(self) -> None:
        """Have calls whose messages are not there end soon, because the server stops."""
        self.is_closing = True

    def _remove(self, call: Silent) -> None:
        if self._answered.pop(call, None) is None:  # where most are when they leave
            self._silent.pop(call, None)
            self._heard.discard(call)
        self._give_back(call)

    def _give_back(self, call: Silent) -> None:
        size = self._bytes.pop(call, 0)
        if size and self._budget is not None:
            self._budget.give_back(size)


def _choose(calls: Iterable[Silent], coming: Silent, most: int) -> list[Silent]:
    """Choose who leaves: the oldest calls of the connection with the most.

    Of connections with as many, one of the address with the most. Who comes is counted as well, so
    that it takes the place of a call of its own rather than that of somebody who has as few.

    Args:
        calls: The oldest first.
        coming: The call that there is to be room for.
        most: Calls that there may be.
    """
    calls = list(calls)
    of_connection = Counter(call.connection for call in (*calls, coming))
    of_address: Counter[str] = Counter()
    for connection, count in of_connection.items():
        of_address[peer_of(connection)] += count

    def weight(connection: str) -> tuple[int, int]:
        return of_connection[connection], of_address[peer_of(connection)]

    # Of equals that of the oldest.
    worst = max(dict.fromkeys(call.connection for call in calls), key=weight, default=None)
    chosen = [call for call in calls if call.connection == worst]
    return chosen[: max(1, min(most // _AT_ONCE, len(chosen) // 2))]


def end_late_calls(rooms: Collection[Room]) -> AbstractContextManager[None]:
    """End the calls in some rooms that are late, from a thread, as long as the block runs."""

    def look() -> None:
        for room in rooms:
            room.end_late()

    return repeating("late-calls", look, _LOOK_S)


class Places:
    """Places for what lasts as long as a client likes. Safe to call from several threads.

    Args:
        most: Places in all.
        share: Part of them that one peer may have, unless it is known.
        reserve: Part of them that only known callers may have.
    """

    def __init__(self, most: int, share: float, reserve: float = 0.0) -> None:
        self._most = most
        self._most_each = max(1, int(most * share))
        self._most_unknown = max(1, int(most * (1 - reserve)))
        self._taken: Counter[str] = Counter()
        self._all = 0
        self._lock = threading.Lock()

    def take(self, peer: str, *, known: bool = False) -> bool:
        """Take a place; tell whether there was one.

        Args:
            peer: As `peer_of` gives it.
            known: Whether the caller has shown who it is.
        """
        with self._lock:
            if self._all >= (self._most if known else self._most_unknown):
                return False
            if not known and self._taken[peer] >= self._most_each:
                return False
            self._taken[peer] += 1
            self._all += 1
        return True

    def give_back(self, peer: str) -> None:
        """Give a place back."""
        with self._lock:
            self._all -= 1
            self._taken[peer] -= 1
            if not self._taken[peer]:
                del self._taken[peer]


@lru_cache(4096)
def peer_of(connection: str) -> str:
    """Find whose a connection is: an address, or the network of an IPv6 address.

    Args:
        connection: As gRPC names it: `ipv4:192.0.2.1:40000`, `ipv6:%5B2001:db8::1%5D:40000`,
            `unix:`.
    """
    host, _ = endpoint_of(connection)
    return network_of(host) if host else connection


@lru_cache(4096)
def endpoint_of(connection: str) -> Endpoint:
    """Find the address and the port of a connection's other side; both are empty without them."""
    host, _, port = unquote(connection).partition(":")[2].rpartition(":")
    return plain_address(host.strip("[]")), port


def plain_address(host: str) -> str:
    """Give a numeric address without its zone, and one of IPv4 that IPv6 holds as IPv4."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return str(getattr(address, "ipv4_mapped", None) or address)


def network_of(host: str) -> str:
    """Give a numeric address as it is, and of IPv6 its network."""
    host = plain_address(host)
    try:
        return str(ipaddress.IPv6Network((host, _IPV6_PREFIX), strict=False))
    except ValueError:
        return host
