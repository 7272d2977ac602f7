"""Errors to gRPC status codes, in one table and one place.

What a client is told is the message of a `VisibleError`; of anything else it learns only that it
was not its fault.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import structlog

from serving.errors import (
    Cancelled,
    ControlRefused,
    Expired,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    NotOffered,
    OverBudget,
    Overloaded,
    TooLarge,
    Unauthenticated,
    VisibleError,
)
from serving.infer_request import InferRequest

# The status of an error, and the reason under which it is counted.
_TABLE: dict[type[VisibleError], tuple[grpc.StatusCode, str]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "invalid"),
    NotOffered: (grpc.StatusCode.UNIMPLEMENTED, "invalid"),
    ModelNotFound: (grpc.StatusCode.NOT_FOUND, "invalid"),
    ModelNotReady: (grpc.StatusCode.UNAVAILABLE, "unavailable"),
    ControlRefused: (grpc.StatusCode.FAILED_PRECONDITION, "invalid"),
    Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, "unauthorised"),
    Forbidden: (grpc.StatusCode.PERMISSION_DENIED, "unauthorised"),
    Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "shed"),
    OverBudget: (grpc.StatusCode.RESOURCE_EXHAUSTED, "memory"),
    TooLarge: (grpc.StatusCode.RESOURCE_EXHAUSTED, "too_large"),
    Expired: (grpc.StatusCode.DEADLINE_EXCEEDED, "expired"),
    Cancelled: (grpc.StatusCode.CANCELLED, "cancelled"),
}
_PUSHBACK = "grpc-retry-pushback-ms"  # when gRPC's own retries are to try again
_LONGEST_PUSHBACK_MS = 60_000

_log = structlog.get_logger()


@dataclass(frozen=True)
class Failure:
    """How a call ends that has no answer.

    Args:
        code: Its status.
        details: What the client is told.
        reason: Under which it is counted.
        retry_after_s: When it may be tried again, in seconds.
    """

    code: grpc.StatusCode
    details: str
    reason: str
    retry_after_s: float | None = None

    @property
    def trailing(self) -> tuple[tuple[str, str], ...]:
        """Metadata to go with it."""
        if self.retry_after_s is None:
            return ()
        pushback = min(max(1, round(self.retry_after_s * 1000)), _LONGEST_PUSHBACK_MS)
        return ((_PUSHBACK, str(pushback)),)

    def end(self, context: grpc.ServicerContext) -> NoReturn:
        """End a call with it."""
        context.set_trailing_metadata(self.trailing)
        context.abort(self.code, self.details)
        raise AssertionError("abort returned")  # it never does


INTERNAL = Failure(grpc.StatusCode.INTERNAL, "internal error; the server's log says more", "failed")
NO_MESSAGE = Failure(grpc.StatusCode.UNIMPLEMENTED, "expected one message, found none", "invalid")


def failure_of(method: str, request: Any, error: Exception) -> Failure:
    """Find what a client is told of an error, and log what it is not told.

    Args:
        method: Which was called.
        request: Its message, if there is one.
        error: What was raised.
    """
    if isinstance(error, VisibleError):
        code, reason = _TABLE[type(error)]
        retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else None
        return Failure(code, str(error), reason, retry_after_s)
    _log.error("request_failed", method=method, **_identity(request), exc_info=error)
    return INTERNAL


def _identity(request: Any) -> dict[str, str]:
    """Say which request it was, for the log."""
    if not isinstance(request, InferRequest):
        return {}
    return {"model": request.model_name, "version": request.model_version, "id": request.id[:128]}
