"""Calls of one message, and what handles them, whichever way they come."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from serving.failures import INTERNAL, Failure
from serving.gate import Gate

Metadata = Sequence[tuple[str, str | bytes]]

_FOR_EVER_S = 1e9

_log = structlog.get_logger()


class Deadline:
    """The deadline of a call by the monotonic clock, which nobody sets.

    gRPC compares deadlines with the wall clock whenever it is asked: once that clock has been set
    forward, every call with a deadline would be past it.

    Args:
        remaining_s: Seconds that are left now; infinite without a deadline.
    """

    __slots__ = ("_end",)

    def __init__(self, remaining_s: float) -> None:
        # gRPC's word for "no deadline" is a time in some hundred thousand million years.
        self._end = math.inf if remaining_s > _FOR_EVER_S else time.monotonic() + remaining_s

    def remaining(self) -> float:
        """Return the seconds that are left, at least zero."""
        return self._end if self._end == math.inf else max(0.0, self._end - time.monotonic())


class UnaryCall(ABC):
    """A call of one message, which ends once: with an answer, a status, or with its client.

    All methods may be called from any thread, and none of them waits.
    """

    __slots__ = ()

    @property
    def runs_short(self) -> bool:
        """Whether the thread that takes the message runs short batches as well."""
        return False

    @abstractmethod
    def invocation_metadata(self) -> Metadata:
        """Return the metadata that the client sent."""

    @abstractmethod
    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """Return what gRPC knows of the connection's client, by property."""

    @abstractmethod
    def peer(self) -> str:
        """Return the connection, as gRPC names it."""

    @property
    @abstractmethod
    def connection(self) -> str:
        """The connection, as gRPC names it."""

    @abstractmethod
    def time_remaining(self) -> float:
        """Return for how many seconds the answer is wanted; infinite without a deadline."""

    @abstractmethod
    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have something called if the call ends unanswered; return False if it has ended."""

    @abstractmethod
    def hold(self, size: int) -> bool:
        """Count more bytes of the message; return False if the budget has no room for them."""

    @abstractmethod
    def give_up(self, *, late: bool) -> None:
        """End because no message has come, or because the answer is not taken.

        Args:
            late: Whether it has had its time; if not, its place is needed.
        """

    @abstractmethod
    def answer(self, content: bytes) -> None:
        """Send the answer, which ends the call."""

    @abstractmethod
    def fail(self, failure: Failure) -> None:
        """End without an answer."""

    @abstractmethod
    def publish(self, content: bytes) -> None:
        """Send one of several answers; it replaces one that could not be sent yet."""

    @abstractmethod
    def finish(self) -> None:
        """End after the answers that were published."""

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Whether it has ended by `finish`."""


@dataclass(frozen=True)
class UnaryMethod:
    """What handles the calls of a method of one message.

    Args:
        gate: Admits calls, before their message is read.
        begin: Takes a message and its call, and sees to the answer. It must not wait, because
            other calls wait for its thread.
        watchers: How many calls there may be that have several answers and last as long as their
            clients like; 0 if every call has one answer.
    """

    gate: Gate
    begin: Callable[[bytes, UnaryCall], None]
    watchers: int = 0

    def take(self, message: bytes, call: UnaryCall) -> None:
        """Take a message that has come."""
        try:
            failure = self.gate.hold(call, message)
            if failure is None:
                self.begin(message, call)
        except Exception as error:  # it must not end the thread that reads all calls
            _log.error("request_failed", exc_info=error)
            failure = INTERNAL
        if failure is not None:
            call.fail(failure)
        elif self.watchers:
            self.gate.room.leave(call)
