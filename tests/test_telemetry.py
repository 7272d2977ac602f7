"""What is told of requests: numbers, lines in the log, spans, as those who read them see them."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from serving.observability import tracing
from serving.observability.metrics import _SECONDS, Counters
from serving.observability.statistics import Spent, Statistics
from serving.server import Server
from tests.conftest import STATE_DICTS, run_module
from tests.servers import WAIT_S, Gate, await_true, gate, served
from tests.wire import raw_request

__all__ = ["gate"]

UNIFORM = STATE_DICTS[0]
MODEL = {"model": UNIFORM.name}
ROW = raw_request(UNIFORM.x[:1])
PARTS = ("request", "parse", "queue", "batch_wait", "compute", "serialise")


def value(server: Server, name: str, **labels: str) -> float | None:
    return server.registry.get_sample_value(f"kanserve_{name}", labels)


@pytest.mark.usefixtures("threads")
def test_where_the_time_of_requests_goes_is_counted(repository: Path) -> None:
    with served(repository) as (server, stub):
        for rows in (1, 3, 20):
            stub.ModelInfer(raw_request(UNIFORM.x[:rows]), timeout=WAIT_S)
        list(stub.ModelStreamInfer(iter([ROW, ROW]), timeout=WAIT_S))
        for part in PARTS:
            assert value(server, f"{part}_seconds_count", **MODEL) == 5
        spent = {part: value(server, f"{part}_seconds_sum", **MODEL) or 0.0 for part in PARTS}
        assert spent["batch_wait"] == 0
        assert 0 < spent["compute"] < spent["request"]
        parts = spent["parse"] + spent["queue"] + spent["compute"] + spent["serialise"]
        assert parts < spent["request"]
        assert value(server, "request_rows_sum", **MODEL) == 26
        assert value(server, "request_rows_bucket", le="1.0", **MODEL) == 3
        assert value(server, "request_rows_bucket", le="4.0", **MODEL) == 4
        assert value(server, "request_rows_bucket", le="+Inf", **MODEL) == 5


def test_buckets_hold_what_is_at_most_their_bound() -> None:
    counters, statistics = Counters(), Statistics("m", 1)
    for seconds in (*_SECONDS, math.nextafter(_SECONDS[0], 1), 1e9):
        counters.count_answer("ModelInfer", statistics, 1, Spent(seconds, 0, 0, 0, 0, 0))
    (family,) = [f for f in counters.collect() if f.name == "kanserve_request_seconds"]
    buckets = [s.value for s in family.samples if s.name.endswith("_bucket")]
    assert buckets[0] == 1
    assert buckets[1:] == [i + 2 for i in range(1, len(_SECONDS))] + [len(_SECONDS) + 2]


def test_waiting_for_company_is_told_apart_from_waiting_for_a_slot(repository: Path) -> None:
    with served(repository, max_wait_ms=20) as (server, stub):
        stub.ModelInfer(ROW, timeout=WAIT_S)
        waited = value(server, "batch_wait_seconds_sum", **MODEL) or 0.0
        assert 0.02 - 1e-6 <= waited <= (value(server, "queue_seconds_sum", **MODEL) or 0.0)


def test_refusals_are_counted_by_reason(repository: Path, gate: Gate) -> None:
    with served(repository, engine_slots=1, max_requests=2) as (server, stub):

        def refusals() -> dict[str, float]:
            reasons = ("invalid", "expired", "cancelled", "shed", "unauthorised", "failed")
            found = {r: value(server, "refusals_total", reason=r) or 0.0 for r in reasons}
            return {reason: count for reason, count in found.items() if count}

        assert refusals() == {}
        for wrong in (raw_request(UNIFORM.x, "none"), raw_request(UNIFORM.x[:, :1])):
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(wrong, timeout=WAIT_S)
        running = stub.ModelInfer.future(ROW)
        gate.await_run()
        gone = stub.ModelInfer.future(ROW)
        await_true(lambda: value(server, "queue_rows", **MODEL) == 1)
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(ROW, timeout=WAIT_S)  # there is no third place
        gone.cancel()
        await_true(lambda: "cancelled" in refusals())

        def expires() -> bool:  # or is refused, while the place of who is gone is not yet free
            with pytest.raises(grpc.RpcError) as late:
                stub.ModelInfer(ROW, timeout=0.2)
            return late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        # At its deadline the client leaves, too: whichever the server sees first is counted.
        await_true(lambda: expires() and "expired" in refusals())
        found = refusals()
        assert min(found.pop(reason) for reason in ("shed", "expired", "cancelled")) >= 1
        assert found == {"invalid": 2}
        gate.opened.set()
        running.result(WAIT_S)


def test_whether_the_server_is_ready_is_told(repository: Path) -> None:
    with served(repository) as (server, _):
        assert value(server, "ready") == 1
        server.drain()
        assert value(server, "ready") == 0


def test_requests_are_logged_with_their_ids(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        structlog.testing.capture_logs() as events,
        served(repository, log_requests="on") as (_, stub),
    ):
        stub.ModelInfer(raw_request(UNIFORM.x[:2], id="own"), timeout=WAIT_S)
        stub.ModelInfer(ROW, metadata=(("x-request-id", "sent"),), timeout=WAIT_S)
        stub.ModelInfer(ROW, timeout=WAIT_S)
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(raw_request(UNIFORM.x, "none", id="bad"), timeout=WAIT_S)
    own, sent, drawn, bad = [e for e in events if e["event"] == "request"]
    assert (own["id"], own["model"], own["version"], own["rows"], own["code"]) == (
        "own", UNIFORM.name, 1, 2, "OK",
    )  # fmt: skip
    assert own["compute_us"] <= own["request_us"]
    assert sent["id"] == "sent"
    assert len(drawn["id"]) == 32
    assert (bad["id"], bad["code"], bad["model"]) == ("bad", "NOT_FOUND", "none")


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OpenTelemetry collector that keeps what it is sent."""

    spans: list[trace_pb2.Span] = field(default_factory=list)
    services: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    address: str = ""

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC names it)
        with self.lock:
            for resource in request.resource_spans:
                attributes = resource.resource.attributes
                self.services |= {
                    a.value.string_value for a in attributes if a.key == "service.name"
                }
                for scope in resource.scope_spans:
                    self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield receiver
    server.stop(None).wait()


def test_traces_go_on_from_the_caller_and_show_where_the_time_went(
    repository: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_LAST_S", WAIT_S)  # all must come
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with served(repository, otlp_endpoint=receiver.address) as (_, stub):
        context = (("traceparent", f"00-{trace}-{parent}-01"),)
        stub.ModelInfer(ROW, metadata=context, timeout=WAIT_S)
        not_sampled = (("traceparent", f"00-{'1' * 32}-{parent}-00"),)
        stub.ModelInfer(ROW, metadata=not_sampled, timeout=WAIT_S)
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(raw_request(UNIFORM.x, "none"), metadata=context, timeout=WAIT_S)
    assert receiver.services == {"kanserve"}  # and all has come, now that the server has ended
    assert {span.trace_id.hex() for span in receiver.spans} == {trace}
    method = "inference.GRPCInferenceService/ModelInfer"
    whole, failed = [span for span in receiver.spans if span.name == method]
    assert {span.parent_span_id.hex() for span in (whole, failed)} == {parent}
    assert {span.kind for span in (whole, failed)} == {trace_pb2.Span.SPAN_KIND_SERVER}
    parts = [span for span in receiver.spans if span.name != method]
    assert [span.name for span in sorted(parts, key=lambda s: s.start_time_unix_nano)] == [
        "parse",
        "queue",
        "compute",
        "serialise",
    ]
    for part in parts:
        assert part.parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= part.start_time_unix_nano
        assert part.end_time_unix_nano <= whole.end_time_unix_nano
    facts = {a.key: a.value for a in whole.attributes}
    assert facts["kanserve.model"].string_value == UNIFORM.name
    assert facts["kanserve.rows"].int_value == 1
    codes = [{a.key: a.value.int_value for a in s.attributes} for s in (whole, failed)]
    assert [c["rpc.grpc.status_code"] for c in codes] == [0, 5]


def test_requests_are_answered_though_nobody_takes_their_traces(repository: Path) -> None:
    with served(repository, otlp_endpoint="http://127.0.0.1:1") as (_, stub):
        np.testing.assert_equal(len(stub.ModelInfer(ROW, timeout=WAIT_S).raw_output_contents), 1)


def test_a_collector_that_takes_nothing_does_not_hold_up_the_end(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sending what is left may take OpenTelemetry longer than containers are given to end."""
    provider = pytest.importorskip("opentelemetry.sdk.trace").TracerProvider
    monkeypatch.setattr(provider, "shutdown", lambda self: threading.Event().wait())
    with served(repository, otlp_endpoint="http://127.0.0.1:1") as (_, stub):
        stub.ModelInfer(ROW, timeout=WAIT_S)


def test_traces_that_go_nowhere_are_refused_at_the_start(repository: Path) -> None:
    done = run_module(
        "serving", "--model-repository", repository, "--grpc-port", "0", "--metrics-port", "0",
        "--otlp-endpoint", "127.0.0.1:4317",
    )  # fmt: skip
    assert done.returncode == 1
    assert "--otlp-endpoint 127.0.0.1:4317: expected http:// or https://" in done.stderr
