"""A budget of bytes for what callers send and are sent: one for each process of the server.

A message that has arrived counts from then until its call is answered, and an answer until its
client has taken it (see `Room`). What has come of other messages is measured (see pressure.py).
This module knows no gRPC.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Iterable

import structlog

from serving import memory
from serving.errors import StartupError

MESSAGE_COPIES = 3
"""As sent, parsed, and its tensors: what a message takes, at most, as a multiple of its bytes."""

ANSWER_COPIES = 2
"""As written, and in gRPC's buffers."""

ENOUGH = 0.75
"""Part of the budget, down to which it is emptied once it was full."""

_SHARE = 0.5  # of the memory that is left when models are loaded
_OVERHEAD_BYTES = 64  # of a call beside its message: frames and compressed headers

_log = structlog.get_logger()


def default_limit(max_message_bytes: int, workers: int) -> int:
    """Choose a budget from the memory limit: half of what each worker has left.

    The other half is for runs of models, for loading their next versions, and for the gap between
    two looks. The budget has room for one message in any case.

    Args:
        max_message_bytes: Largest message.
        workers: Processes that share the memory.
    """
    left = memory.memory_limit() // workers - (memory.resident_bytes() or 0)
    least = MESSAGE_COPIES * max_message_bytes
    if _SHARE * left < least:
        _log.warning(
            "little_memory",
            left_bytes=max(0, left),
            max_inflight_bytes=least,
            remedy="lower --max-message-bytes, or raise the memory limit",
        )
    return max(int(_SHARE * left), least)


def too_small(limit: int, max_message_bytes: int) -> str | None:
    """Say why a budget cannot be used; None if it can."""
    least = MESSAGE_COPIES * max_message_bytes
    if limit >= least:
        return None
    return (
        f"--max-inflight-bytes: expected at least {least}, {MESSAGE_COPIES} times the largest "
        f"message (--max-message-bytes, {max_message_bytes}), found {limit}; raise it, or lower "
        "--max-message-bytes"
    )


class Budget:
    """Bytes that are held, and how many may be.

    Rooms that share it share its lock as well, so that counting costs no lock of its own.

    Args:
        limit: Bytes that may be held.
        max_message_bytes: Largest message.

    Attributes:
        lock: Held by whoever calls `take`, `give_back` or `hear`.
        limit: As above.
        max_message_bytes: As above.
        in_transit: Bytes of messages that are not whole yet, when they were last measured.
        measured_at: When that was, by the clock of rooms.
    """

    def __init__(self, limit: int, max_message_bytes: int) -> None:
        self.limit = limit
        self.max_message_bytes = max_message_bytes
        self.in_transit = 0
        self.measured_at = -math.inf
        self._held = 0
        self._is_shut = False
        self._heard: defaultdict[str, int] = defaultdict(int)
        self.lock = threading.Lock()  # no other is taken while it is held

    @property
    def held(self) -> int:
        """Bytes of messages and answers that are held."""
        return self._held

    @property
    def most_messages(self) -> int:
        """How many of the largest messages there is room for."""
        return (self.limit - self._held - self.in_transit) // self.max_message_bytes

    @property
    def is_full(self) -> bool:
        """Whether calls are to be rejected before they are read.

        They are from when something did not fit until there is room again for more than a little.
        """
        used = self._held + self.in_transit
        if used <= ENOUGH * self.limit:
            self._is_shut = False
        return self._is_shut or used >= self.limit

    def shut(self) -> None:
        """Have calls rejected until there is room again."""
        self._is_shut = True

    def take(self, size: int, *, always: bool = False) -> bool:
        """Count bytes; tell whether there was room for them.

        Args:
            size: Bytes.
            always: Whether they are counted in any case.
        """
        if not always and self._held + self.in_transit + size > self.limit:
            self._is_shut = True
            return False
        self._held += size
        return True

    def give_back(self, size: int) -> None:
        """Count bytes no longer."""
        self._held -= size

    def hear(self, connection: str, size: int) -> None:
        """Note that a whole message has come, so that its bytes are in transit no longer.

        Args:
            connection: Its name, as gRPC has it.
            size: Bytes, as they were sent.
        """
        self._heard[connection] += size + _OVERHEAD_BYTES

    def heard(self) -> dict[str, int]:
        """Return the bytes of whole messages, by connection."""
        with self.lock:
            return dict(self._heard)

    def forget(self, connections: Iterable[str]) -> None:
        """Drop what is known of connections, because they are closed."""
        with self.lock:
            for name in connections:
                self._heard.pop(name, None)


def choose_budget(limit: int | None, max_message_bytes: int, workers: int) -> Budget:
    """Make the budget of a process.

    Args:
        limit: As it was set; None chooses it.
        max_message_bytes: Largest message.
        workers: Processes that share the memory.

    Raises:
        StartupError: There is no room for one message.
    """
    if limit is None:
        limit = default_limit(max_message_bytes, workers)
    elif wrong := too_small(limit, max_message_bytes):
        raise StartupError(wrong)
    return Budget(limit, max_message_bytes)
