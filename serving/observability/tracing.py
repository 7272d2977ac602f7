"""Spans of requests, sent to an OpenTelemetry collector by OTLP.

A span continues the caller's trace if its metadata has a `traceparent` (W3C), and is sampled as the
caller says. The packages are in the extra `otel`, imported only if traces are wanted.
"""

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from kan_bundle import __version__
from serving.errors import StartupError
from serving.observability.statistics import Spent
from serving.service import SERVICE, Answer

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_log = structlog.get_logger()

_EXPORT_S = 5
_LAST_S = 1.0
_PARTS = ("parse", "queue", "compute", "serialise")  # of a request, in this order


class Tracing:
    """Makes spans, and sends them from a thread of its own.

    Args:
        endpoint: `http://HOST:PORT`, or https for TLS.
        share: Of the requests whose callers do not say whether to trace.

    Raises:
        StartupError: The packages are missing, or the endpoint is no address.
    """

    def __init__(self, endpoint: str, share: float) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise StartupError(f"--otlp-endpoint {endpoint}: expected http:// or https://")
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
            from opentelemetry.trace.propagation.tracecontext import (
                TraceContextTextMapPropagator,
            )
        except ImportError as error:
            raise StartupError(
                "--otlp-endpoint needs OpenTelemetry; "
                "install kanserve's extra otel: pip install '.[otel]' in its checkout"
            ) from error
        resource = Resource.create({"service.name": "kanserve", "service.version": __version__})
        self._provider = TracerProvider(
            ParentBasedTraceIdRatio(share), resource, shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint, timeout=_EXPORT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kanserve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, metadata: Iterable[tuple[str, Any]]) -> "RequestSpan":
        """Begin a span.

        Args:
            method: Which was called.
            metadata: Of the call.
        """
        from opentelemetry.trace import SpanKind

        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        span = self._tracer.start_span(
            f"{SERVICE}/{method}",
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": method},
        )
        return RequestSpan(self._tracer, span)

    def close(self) -> None:
        """Send what is left, as long as that takes no longer than `_LAST_S`.

        A collector that cannot be reached would hold the end of the process for many seconds.
        """
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_LAST_S)
        if last.is_alive():
            _log.warning("spans_not_sent", reason=f"not within {_LAST_S:g} s")


class RequestSpan:
    """The span of one request, with one below it for each part of its time."""

    def __init__(self, tracer: Any, span: "Span") -> None:
        self._tracer = tracer
        self._span = span

    @property
    def trace_id(self) -> str:
        """Of the trace that it is in, in hexadecimal."""
        return format(self._span.get_span_context().trace_id, "032x")

    def answered(self, answer: Answer, spent: Spent) -> None:
        """End it; its parts are laid out backwards from now, as they came one after another."""
        from opentelemetry.trace import set_span_in_context

        end = time.time_ns()
        if self._span.is_recording():
            below = set_span_in_context(self._span)
            stop = end
            for name in reversed(_PARTS):
                start = stop - round(getattr(spent, name) * 1e9)
                self._tracer.start_span(name, below, start_time=start).end(stop)
                stop = start
            self._span.set_attributes(
                {
                    "kanserve.model": answer.model.manifest.name,
                    "kanserve.version": answer.model.manifest.version,
                    "kanserve.rows": answer.rows,
                    "kanserve.batch_rows": answer.outcome.batch_rows,
                    "rpc.grpc.status_code": 0,
                }
            )
        self._span.end(end)

    def failed(self, code: grpc.StatusCode) -> None:
        """End it without an answer."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE):
            self._span.set_status(StatusCode.ERROR)  # the others are the caller's
        self._span.end()
