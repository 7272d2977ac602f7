"""More than the server can do: what is refused, what is dropped, and that the rest is answered."""

import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import Server
from tests.bundles import publish
from tests.conftest import STATE_DICTS
from tests.servers import WAIT_S, Gate, await_true, gate, served
from tests.wire import raw_output, raw_request

__all__ = ["gate"]

UNIFORM = STATE_DICTS[0]
ROW = raw_request(UNIFORM.x[:1])
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def trailers(error: Any) -> dict[str, str]:
    return dict(error.trailing_metadata())


def pushback_ms(error: Any) -> int:
    return int(trailers(error)["grpc-retry-pushback-ms"])


def test_who_comes_when_every_place_is_taken_is_refused_at_the_door(
    repository: Path, gate: Gate
) -> None:
    with served(repository, max_requests=2, engine_slots=1) as (server, stub):
        room = server.rooms["requests"]
        taken = [stub.ModelInfer.future(ROW) for _ in range(2)]
        gate.await_run()
        await_true(lambda: (len(room), room.silent) == (2, 0))
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(ROW, timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert pushback_ms(refused.value) >= 1
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=WAIT_S).ready
        gate.opened.set()
        for future in taken:
            np.testing.assert_allclose(raw_output(future.result(WAIT_S)), UNIFORM.y64[:1], **CLOSE)
        assert sum(map(len, gate.runs)) == 2  # what was refused was never run
        await_true(lambda: stub.ModelInfer.future(ROW).exception(WAIT_S) is None)


def test_a_refused_message_is_never_read(repository: Path, gate: Gate) -> None:
    """Twice as many bytes as fit into a message: who reads them answers so."""
    large = raw_request(np.zeros((2**13, 4), np.float32))
    with served(repository, max_message_bytes=2**16) as (_, stub):
        with pytest.raises(grpc.RpcError) as too_large:
            stub.ModelInfer(large, timeout=WAIT_S)
        assert "grpc-retry-pushback-ms" not in trailers(too_large.value)
    with served(repository, max_message_bytes=2**16, max_requests=1) as (_, stub):
        taken = stub.ModelInfer.future(ROW)
        gate.await_run()
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(large, timeout=WAIT_S)
        assert pushback_ms(refused.value) >= 1
        gate.opened.set()
        taken.result(WAIT_S)


@pytest.mark.parametrize(
    "room", [pytest.param({"max_queue_rows": 5}, id="rows"),
             pytest.param({"max_queue_bytes": 5 * 16}, id="bytes")]
)  # fmt: skip
def test_what_has_no_room_in_the_queue_is_refused(
    repository: Path, gate: Gate, room: dict[str, int]
) -> None:
    with served(repository, engine_slots=1, **room) as (_, stub):
        running = stub.ModelInfer.future(ROW)
        gate.await_run()
        waiting = [stub.ModelInfer.future(ROW) for _ in range(8)]
        await_done(waiting, 4)  # one runs, four wait, and four are told so at once
        gate.opened.set()
        for future in (running, *waiting):
            future.exception(WAIT_S)
        failed = [future.exception() for future in waiting if future.exception() is not None]
        assert {error.code() for error in failed} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert all(pushback_ms(error) >= 1 for error in failed)
        assert len(failed) == 4
        assert sum(map(len, gate.runs)) == 5


def test_a_full_queue_refuses_before_messages_are_read(
    repository: Path, tmp_path: Path, gate: Gate
) -> None:
    publish(repository / UNIFORM.name / "1", tmp_path / UNIFORM.name, 1)
    limits = {"max_queue_rows": 1, "max_message_bytes": 2**16}
    with served(tmp_path, engine_slots=1, **limits) as (server, stub):
        running = stub.ModelInfer.future(ROW)
        gate.await_run()
        waiting = stub.ModelInfer.future(ROW)
        await_queue(server, rows=1)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(raw_request(np.zeros((2**13, 4), np.float32)), timeout=WAIT_S)
        assert pushback_ms(refused.value) >= 1  # who reads it says that it is too large
        gate.opened.set()
        for future in (running, waiting):
            future.result(WAIT_S)


def test_a_full_queue_of_one_model_leaves_the_others_theirs(repository: Path, gate: Gate) -> None:
    other = STATE_DICTS[1]
    with served(repository, engine_slots=1, max_queue_rows=1) as (server, stub):
        running = stub.ModelInfer.future(ROW)
        gate.await_run()
        waiting = stub.ModelInfer.future(ROW)
        await_queue(server, rows=1)
        second = stub.ModelInfer.future(raw_request(other.x[:1], other.name))
        assert stub.ModelInfer.future(ROW).exception(WAIT_S) is not None
        gate.opened.set()
        found = raw_output(second.result(WAIT_S))
        np.testing.assert_allclose(found, other.y64[:1], **CLOSE)
        for future in (running, waiting):
            future.result(WAIT_S)


def await_done(futures: list[Any], count: int) -> None:
    done = threading.Semaphore(0)
    for future in futures:
        future.add_done_callback(lambda _: done.release())
    for _ in range(count):
        assert done.acquire(timeout=WAIT_S)


@pytest.mark.parametrize("end", ["deadline", "cancel", "connection"])
def test_work_that_nobody_waits_for_is_never_run(repository: Path, gate: Gate, end: str) -> None:
    with (
        served(repository, engine_slots=1) as (server, stub),
        grpc.insecure_channel(server.address) as other,
    ):
        grpc.channel_ready_future(other).result(WAIT_S)  # which is not to take of the deadline
        first = stub.ModelInfer.future(ROW)
        gate.await_run()
        given_up = GRPCInferenceServiceStub(other).ModelInfer.future(
            raw_request(UNIFORM.x[1:2]), timeout=5.0 if end == "deadline" else WAIT_S
        )
        after = stub.ModelInfer.future(raw_request(UNIFORM.x[2:3]))
        await_queue(server, rows=2)
        if end == "cancel":
            given_up.cancel()
        if end == "connection":
            other.close()
        if end == "deadline":
            assert given_up.exception(WAIT_S).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await_queue(server, rows=1)
        gate.opened.set()
        np.testing.assert_allclose(raw_output(after.result(WAIT_S)), UNIFORM.y64[2:3], **CLOSE)
        first.result(WAIT_S)
        assert [run.tolist() for run in gate.runs] == [
            UNIFORM.x[:1].tolist(), UNIFORM.x[2:3].tolist()
        ]  # fmt: skip


def await_queue(server: Server, rows: int) -> None:
    """Wait until so many rows stand in line."""
    lane = server.repository.find(UNIFORM.name, "").lane
    await_true(lambda: lane.rows == rows)


def test_a_deadline_that_cannot_be_met_is_refused_at_once(repository: Path) -> None:
    with served(repository) as (server, stub):
        lane = server.repository.find(UNIFORM.name, "").lane
        lane.pace.learn(1, 1000.0)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(ROW, timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "leaves no time" in str(refused.value.details())
        assert raw_output(stub.ModelInfer(ROW)).shape == (1, 3)  # without one it is run


def test_a_timeout_in_a_request_is_a_deadline(repository: Path, gate: Gate) -> None:
    request = raw_request(UNIFORM.x[1:2])
    request.parameters["timeout"].int64_param = 1000  # microseconds
    with served(repository, engine_slots=1) as (server, stub):
        running = stub.ModelInfer.future(ROW)
        gate.await_run()
        lane = server.repository.find(UNIFORM.name, "").lane
        waiting = stub.ModelInfer.future(request)  # without a deadline that gRPC knows of
        await_true(lambda: lane.rows == 1)
        end = time.monotonic() + 1e-3
        await_true(lambda: time.monotonic() > end)
        gate.opened.set()
        running.result(WAIT_S)
        assert waiting.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(gate.runs) == 1
        lane.pace.learn(1, 1000.0)
        refused = stub.ModelInfer.future(request)
        assert refused.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "leaves no time" in str(refused.details())


def test_rows_that_wait_for_company_run_together(repository: Path) -> None:
    with served(
        repository, model_limits={UNIFORM.name: {"max_wait_ms": 10_000, "max_batch_rows": 3}}
    ) as (_, stub):
        requests = [raw_request(UNIFORM.x[i : i + 1]) for i in range(3)]
        for request in requests:
            request.parameters["kanserve_details"].bool_param = True
        futures = [stub.ModelInfer.future(request) for request in requests]
        responses = [future.result(WAIT_S) for future in futures]
        for i, response in enumerate(responses):
            np.testing.assert_allclose(raw_output(response), UNIFORM.y64[i : i + 1], **CLOSE)
            assert response.parameters["batch_rows"].int64_param == 3


def test_a_large_request_runs_in_parts_and_is_answered_whole(repository: Path, gate: Gate) -> None:
    gate.opened.set()
    with served(repository, max_batch_rows=3) as (_, stub):
        response = stub.ModelInfer(raw_request(UNIFORM.x[:10]))
        np.testing.assert_allclose(raw_output(response), UNIFORM.y64[:10], **CLOSE)
        assert [len(run) for run in gate.runs] == [3, 3, 3, 1]


def test_liveness_looks_at_whether_requests_run(
    repository: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.dispatch._HUNG_S", 0.1)
    with (
        served(repository, engine_slots=1, max_batch_rows=1) as (server, stub),
        grpc.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        live = health.Watch(health_pb2.HealthCheckRequest(service="live"))
        ready = health.Watch(health_pb2.HealthCheckRequest())
        assert next(live).status == next(ready).status == SERVING
        calls = [stub.ModelInfer.future(ROW) for _ in range(2)]
        gate.await_run()
        assert next(live).status == next(ready).status == NOT_SERVING
        gate.opened.set()
        assert next(live).status == next(ready).status == SERVING
        assert all(call.result(WAIT_S) for call in calls)
