"""What a call passes before its message is read."""

from collections.abc import Callable
from dataclasses import dataclass

from serving.budget import MESSAGE_COPIES
from serving.callers import Caller
from serving.errors import (
    Cancelled,
    Expired,
    ModelNotReady,
    NotOffered,
    OverBudget,
    Overloaded,
    TooLarge,
    VisibleError,
)
from serving.failures import Failure
from serving.room import Room, Silent

OVER_BUDGET = "the server holds as many bytes of messages and answers as it may"


@dataclass(frozen=True)
class Gate:
    """The way in to a method.

    Args:
        room: What its calls take room in, with those of other methods.
        admit: Raises a VisibleError if a caller may not come in.
        refused: Counts an error that a call ends with, and finds what its caller is told.
        retry_after_s: Tells when there will be room again, in seconds.
        max_message_bytes: Largest message, as it is sent.
        always: Whether messages are let in even if the budget has no room for them.
    """

    room: Room
    admit: Callable[[Caller], None]
    refused: Callable[[Exception], Failure]
    retry_after_s: Callable[[], float]
    max_message_bytes: int
    always: bool = False

    def refusal(self, caller: Caller) -> Failure | None:
        """Tell how a call ends that may not come in; None if it may."""
        try:
            self.admit(caller)
        except Exception as error:  # one of ours would end gRPC's thread
            return self.refused(error)
        return None

    def full(self) -> Failure:
        """Tell how a call ends for which there is no room."""
        return self.refused(
            Overloaded("the server has no room for another call", self.retry_after_s())
        )

    def hold(self, call: Silent, message: bytes) -> Failure | None:
        """Count a message that is there; tell how its call ends if it may not be taken in.

        Args:
            call: Whose it is.
            message: As it was sent.
        """
        if len(message) > self.max_message_bytes:
            return self.too_large()
        if self.room.hold(call, MESSAGE_COPIES * len(message), always=self.always):
            return None
        return self.refused(OverBudget(OVER_BUDGET, self.retry_after_s()))

    def too_large(self) -> Failure:
        """Tell how a call ends whose message is larger than it may be."""
        return self.refused(
            TooLarge(
                f"expected a message of at most {self.max_message_bytes} bytes, found a larger one"
            )
        )

    def no_message(self, *, cancelled: bool) -> Failure:
        """Tell how a call ends without a message: its client has sent none, or has gone."""
        return self.refused(
            Cancelled("cancelled") if cancelled else NotOffered("expected one message, found none")
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
