"""Until when an answer is wanted, by a clock that nobody sets.

gRPC's own context compares a call's deadline with the wall clock each time that it is asked: once
that clock has been set forward, every stream that has a deadline would be past it. So the context
is asked once, when the call comes, and from then on the monotonic clock counts.
"""

import time

import grpc


class Deadline:
    """How long there is for a call.

    Args:
        context: Of the call, which has just come.
    """

    __slots__ = ("_end",)

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._end = time.monotonic() + context.time_remaining()

    def remaining(self) -> float:
        """Tell for how many seconds the answer is wanted; without a deadline, for ages."""
        return max(0.0, self._end - time.monotonic())
