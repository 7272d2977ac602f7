"""What requests share, in calls of their own and in streams: reading, counting, writing."""

from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import Message

from protos import inference_pb2 as pb
from serving.budget import MESSAGE_COPIES, Budget
from serving.errors import OverBudget
from serving.failures import Failure, failure_of
from serving.gate import OVER_BUDGET
from serving.messages import inflate, parse_inflated
from serving.observability.telemetry import Record, Telemetry
from serving.service import Answer, InferenceService

METHOD = "ModelInfer"
METHOD_STREAM = "ModelStreamInfer"
_FINAL = "triton_final_response"  # clients of streams wait for it; there is one answer to a request


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

    def parse(self, raw: bytes, hold: Callable[[int], bool]) -> pb.ModelInferRequest:
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
        return parse_inflated(pb.ModelInferRequest, content)

    def refused(self, method: str, error: Exception) -> Failure:
        """Count a call that ends with an error, and find how."""
        failure = failure_of(method, None, error)
        self.telemetry.counters.count_call(method, failure.code.name, failure.reason)
        return failure


def written(answer: Answer, record: Record, *, in_stream: bool = False) -> bytes:
    """Write an answer, and tell that a request has it."""
    message: Message = answer.response
    if in_stream:
        answer.response.parameters[_FINAL].bool_param = True
        message = pb.ModelStreamInferResponse(infer_response=answer.response)
    content = message.SerializeToString()
    record.answered(answer)
    return content
