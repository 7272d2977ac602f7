"""What a call passes before its message is read."""

from collections.abc import Callable
from dataclasses import dataclass

import grpc

from serving.errors import Expired, ModelNotReady, Overloaded, VisibleError
from serving.failures import Failure
from serving.room import Room


@dataclass(frozen=True)
class Gate:
    """The way in to a method.

    Args:
        room: What its calls take room in, with those of other methods.
        admit: Raises a VisibleError if a caller may not come in.
        refused: Counts an error that a call ends with, and finds what its caller is told.
        retry_after_s: Tells when there will be room again, in seconds.
    """

    room: Room
    admit: Callable[[grpc.ServicerContext], None]
    refused: Callable[[Exception], Failure]
    retry_after_s: Callable[[], float]

    def refusal(self, context: grpc.ServicerContext) -> Failure | None:
        """Tell how a call ends that may not come in; None if it may."""
        try:
            self.admit(context)
        except Exception as error:  # one of ours would end gRPC's thread
            return self.refused(error)
        return None

    def full(self) -> Failure:
        """Tell how a call ends for which there is no room."""
        return self.refused(
            Overloaded("the server has no room for another call", self.retry_after_s())
        )

    def silent(self, *, late: bool) -> Failure:
        """Tell how a call ends whose message is not there, because of the time or for its room."""
        error: VisibleError
        if self.room.is_closing:
            error = ModelNotReady("the server is stopping; go on elsewhere")
        elif late:
            error = Expired(
                f"expected a whole message within {self.room.patience_s:g} s "
                "(--receive-timeout-s), found less"
            )
        else:
            error = Overloaded(
                "the message was not there yet, and another call needs the room",
                self.retry_after_s(),
            )
        return self.refused(error)
