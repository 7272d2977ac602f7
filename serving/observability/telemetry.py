"""What is told of each request when it ends: counted always, logged and traced if wanted."""

import time
import uuid
from typing import Any

import structlog

from serving.callers import Caller
from serving.failures import Failure
from serving.infer_request import InferRequest
from serving.observability.metrics import Counters
from serving.observability.statistics import Spent
from serving.observability.tracing import Tracing
from serving.service import Answer

_REQUEST_ID = "x-request-id"
_MOST_OF_AN_ID = 128

_log = structlog.get_logger()


class Telemetry:
    """Told of every request.

    Args:
        counters: Count it.
        tracing: Makes a span of it; None for none.
        log_requests: Whether it is logged.
    """

    def __init__(self, counters: Counters, tracing: Tracing | None, *, log_requests: bool) -> None:
        self.counters = counters
        self.tracing = tracing
        self.log_requests = log_requests

    def begin(self, method: str, caller: Caller) -> "Record":
        """Take the time at which a message has arrived.

        Args:
            method: Which was called.
            caller: The call, as gRPC describes it.
        """
        return Record(self, method, caller)


class Record:
    """One request, from its arrival to its end, which is told once."""

    __slots__ = ("_caller", "_method", "_span", "_started", "_telemetry")

    def __init__(self, telemetry: Telemetry, method: str, caller: Caller) -> None:
        self._telemetry = telemetry
        self._method = method
        self._caller = caller
        self._started = time.perf_counter()
        self._span = None
        if telemetry.tracing is not None:
            self._span = telemetry.tracing.begin(method, caller.invocation_metadata())

    def answered(self, answer: Answer) -> None:
        """Tell that it has its answer, which has been serialised."""
        now = time.perf_counter()
        outcome = answer.outcome
        spent = Spent(
            now - self._started,
            answer.parse_s,
            outcome.queue_s,
            outcome.batch_wait_s,
            outcome.compute_s,
            now - answer.ended,
        )
        telemetry, model = self._telemetry, answer.model
        telemetry.counters.count_answer(self._method, model.statistics, answer.rows, spent)
        if self._span is not None:
            self._span.answered(answer, spent)
        if telemetry.log_requests:
            self._log(
                answer.id,
                "OK",
                model=model.manifest.name,
                version=model.manifest.version,
                rows=answer.rows,
                batch_rows=outcome.batch_rows,
                **{f"{name}_us": round(s * 1e6) for name, s in spent._asdict().items()},
            )

    def failed(self, failure: Failure, request: Any) -> None:
        """Tell that it has none.

        Args:
            failure: Why.
            request: Its message, if it was one.
        """
        code = failure.code.name
        self._telemetry.counters.count_call(self._method, code, failure.reason)
        if self._span is not None:
            self._span.failed(failure.code)
        if self._telemetry.log_requests:
            known = isinstance(request, InferRequest)
            asked = {"model": request.model_name[:_MOST_OF_AN_ID]} if known else {}
            self._log(request.id if known else "", code, reason=failure.details, **asked)

    def _log(self, own_id: str, code: str, **facts: Any) -> None:
        if self._span is not None:
            facts["trace_id"] = self._span.trace_id
        _log.info("request", id=self._id(own_id), method=self._method, code=code, **facts)

    def _id(self, own_id: str) -> str:
        """Name the request: as its message does, or its metadata; else by chance."""
        if not own_id:
            metadata = dict(self._caller.invocation_metadata())
            own_id = str(metadata.get(_REQUEST_ID) or uuid.uuid4().hex)
        return own_id[:_MOST_OF_AN_ID]
