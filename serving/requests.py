"""What requests share, in calls of their own and in streams: reading and counting."""

from collections.abc import Callable
from dataclasses import dataclass

from serving.budget import MESSAGE_COPIES, Budget
from serving.errors import OverBudget
from serving.failures import Failure, failure_of
from serving.gate import OVER_BUDGET
from serving.infer_request import InferRequest
from serving.messages import inflate
from serving.observability.telemetry import Telemetry
from serving.service import InferenceService

METHOD = "ModelInfer"
METHOD_STREAM = "ModelStreamInfer"


@dataclass(frozen=True)
class Requests:
    """What answers requests, and what counts them.

    Args:
        service: Answers.
        telemetry: Told how every call ended.
        budget: Counts the bytes of messages and answers.
        max_message_bytes: Largest message, once it is inflated.
        retry_after_s: Tells when there will be room again, in seconds.
    """

    service: InferenceService
    telemetry: Telemetry
    budget: Budget
    max_message_bytes: int
    retry_after_s: Callable[[], float]

    def require_budget(self) -> None:
        """Raise OverBudget where the bytes of another message have no room."""
        if self.budget.is_full:
            raise self.over_budget()

    def over_budget(self) -> OverBudget:
        """Make the error of a message that has no room."""
        return OverBudget(OVER_BUDGET, self.retry_after_s())

    def parse(self, raw: bytes, hold: Callable[[int], bool]) -> InferRequest:
        """Read a request.

        Args:
            raw: As it was sent.
            hold: Counts more bytes of it, those that it is inflated to; tells whether there is
                room.

        Raises:
            OverBudget: There is none.
            TooLarge: It is larger than a message may be.
            InvalidRequest: It is no request.
        """
        content = inflate(raw, self.max_message_bytes)
        if content is not raw and not hold(MESSAGE_COPIES * len(content)):
            raise self.over_budget()
        return InferRequest(content)

    def refused(self, method: str, error: Exception) -> Failure:
        """Count a call that ends with an error, and find how."""
        failure = failure_of(method, None, error)
        self.telemetry.counters.count_call(method, failure.code.name, failure.reason)
        return failure
