"""ModelStreamInfer: batches in, batches out, over one call."""

import gc
import itertools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.batching import Lane
from serving.dispatch import Request
from tests.conftest import STATE_DICTS
from tests.servers import WAIT_S, Gate, await_true, gate, served
from tests.wire import raw_output, raw_request

__all__ = ["gate"]

UNIFORM = STATE_DICTS[0]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


class Requests:
    """The requests of a stream, given one at a time, until it is closed."""

    def __init__(self) -> None:
        self._queue: queue.Queue[pb.ModelInferRequest | None] = queue.Queue()

    def __iter__(self) -> Iterator[pb.ModelInferRequest]:
        return iter(self._queue.get, None)

    def send(self, request: pb.ModelInferRequest) -> None:
        self._queue.put(request)

    def close(self) -> None:
        self._queue.put(None)


def test_answers_come_in_the_order_of_the_requests(stub: GRPCInferenceServiceStub) -> None:
    sent = [raw_request(UNIFORM.x[: i % 7], id=str(i)) for i in range(200)]
    answers = list(stub.ModelStreamInfer(iter(sent)))
    assert [a.infer_response.id for a in answers] == [str(i) for i in range(200)]
    for i, answer in enumerate(answers):
        assert not answer.error_message
        np.testing.assert_allclose(raw_output(answer.infer_response), UNIFORM.y64[: i % 7], **CLOSE)


def test_a_bad_request_is_answered_and_the_stream_goes_on(stub: GRPCInferenceServiceStub) -> None:
    good = raw_request(UNIFORM.x[:1], id="good")
    bad = raw_request(np.zeros((1, 5), np.float32), id="bad")
    unknown = raw_request(UNIFORM.x[:1], "none", id="unknown")
    answers = list(stub.ModelStreamInfer(iter([good, bad, unknown, good])))
    assert [a.infer_response.id for a in answers] == ["good", "bad", "unknown", "good"]
    assert [bool(a.error_message) for a in answers] == [False, True, True, False]
    assert "expected shape [-1, 4]" in answers[1].error_message
    assert "no model 'none'" in answers[2].error_message
    assert not answers[1].infer_response.outputs


def test_tritons_strict_streams_end_with_a_status(stub: GRPCInferenceServiceStub) -> None:
    requests = [raw_request(UNIFORM.x[:1]), raw_request(UNIFORM.x[:1], "none")]
    stream = stub.ModelStreamInfer(
        itertools.cycle(requests), metadata=(("triton_grpc_error", "true"),)
    )
    assert not next(stream).error_message
    with pytest.raises(grpc.RpcError) as ended:
        next(stream)
    assert ended.value.code() is grpc.StatusCode.NOT_FOUND


def test_bytes_that_are_no_message_are_an_answer_too(repository: Path) -> None:
    with served(repository) as (server, _), grpc.insecure_channel(server.address) as channel:
        call: Any = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        (answer,) = call(iter([b"\xff\xff"]))
        assert "found no such message" in answer.error_message


def test_a_client_that_does_not_read_is_not_worked_for(repository: Path, gate: Gate) -> None:
    """Only what fits into the windows of HTTP/2 and buffers on the way is run."""
    gate.opened.set()
    x = np.zeros((4096, 4), np.float32)  # 48 KiB come back, 64 KiB go
    count = 600
    with served(repository, max_batch_rows=len(x)) as (_, stub):
        stream = stub.ModelStreamInfer(raw_request(x, id=str(i)) for i in range(count))
        while gate.entered.acquire(timeout=1.0):
            pass  # until nothing is run any longer
        assert len(gate.runs) < count // 2
        assert [a.infer_response.id for a in stream] == [str(i) for i in range(count)]


@dataclass
class OneBehindTheOther:
    """Two streams of a server with one slot: each request of the second waits for the first's."""

    lane: Lane[Request]
    gate: Gate
    requests: tuple[Requests, Requests]
    answers: tuple[Any, Any]

    def send(self, row: int) -> None:
        self.gate.opened.clear()
        self.requests[0].send(raw_request(UNIFORM.x[:1]))
        self.gate.await_run()
        self.requests[1].send(raw_request(UNIFORM.x[row : row + 1]))
        await_true(lambda: self.lane.rows == 1)

    def answer(self) -> None:
        self.gate.opened.set()
        self.gate.await_run()
        for stream in self.answers:
            next(stream)


@pytest.fixture
def streams(repository: Path, gate: Gate) -> Iterator[OneBehindTheOther]:
    with served(repository, engine_slots=1) as (server, stub):
        requests = Requests(), Requests()
        first, second = (stub.ModelStreamInfer(iter(sent)) for sent in requests)
        lane = server.repository.find(UNIFORM.name, "").lane
        yield OneBehindTheOther(lane, gate, requests, (first, second))
        gate.opened.set()
        for sent in requests:
            sent.close()


def all_requests() -> list[Request]:
    return [found for found in gc.get_objects() if type(found) is Request]


def test_a_stream_keeps_nothing_of_what_it_has_answered(streams: OneBehindTheOther) -> None:
    others = all_requests()
    for row in range(10):
        streams.send(row)
        streams.answer()
    gc.collect()
    kept = [request for request in all_requests() if request not in others]
    assert len(kept) <= 2


def test_a_request_of_a_stream_that_is_cancelled_is_never_run(streams: OneBehindTheOther) -> None:
    streams.send(1)
    streams.answer()
    streams.send(2)
    streams.answers[1].cancel()
    await_true(lambda: streams.lane.rows == 0)
    streams.gate.opened.set()
    next(streams.answers[0])
    assert not any((run == UNIFORM.x[2]).all() for run in streams.gate.runs)


def test_streams_beyond_the_limit_are_refused_and_unary_calls_are_not(repository: Path) -> None:
    with served(repository, max_streams=1) as (_, stub):
        requests = Requests()
        stream = stub.ModelStreamInfer(iter(requests))
        requests.send(raw_request(UNIFORM.x[:1]))
        next(stream)
        with pytest.raises(grpc.RpcError) as refused:
            next(stub.ModelStreamInfer(iter([raw_request(UNIFORM.x[:1])])))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raw_output(stub.ModelInfer(raw_request(UNIFORM.x[:1]))).shape == (1, 3)
        requests.close()
        assert list(stream) == []


def test_the_end_of_the_server_ends_streams_after_what_they_work_on(
    repository: Path, gate: Gate
) -> None:
    with served(repository) as (server, stub):
        idle, busy = Requests(), Requests()
        idle_stream, busy_stream = (stub.ModelStreamInfer(iter(r)) for r in (idle, busy))
        busy.send(raw_request(UNIFORM.x[:1]))
        gate.await_run()
        gate.opened.set()
        next(busy_stream)
        idle.send(raw_request(UNIFORM.x[:1]))
        next(idle_stream)
        gate.await_run()
        gate.opened.clear()
        busy.send(raw_request(UNIFORM.x[:1], id="last"))
        gate.await_run()
        stopping = threading.Thread(target=server.stop, args=(600, lambda: False))
        stopping.start()
        with pytest.raises(grpc.RpcError) as ended:
            next(idle_stream)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        gate.opened.set()
        assert next(busy_stream).infer_response.id == "last"
        with pytest.raises(grpc.RpcError) as ended:
            next(busy_stream)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        stopping.join(WAIT_S)
        assert not stopping.is_alive()
        for requests in (idle, busy):
            requests.close()


def test_a_clock_that_is_set_forward_ends_no_stream(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(repository) as (_, stub):
        requests = Requests()
        stream = stub.ModelStreamInfer(iter(requests), timeout=WAIT_S)
        requests.send(raw_request(UNIFORM.x))
        assert not next(stream).error_message
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 86_400)
        requests.send(raw_request(UNIFORM.x))
        answer = next(stream)
        assert not answer.error_message
        np.testing.assert_allclose(raw_output(answer.infer_response), UNIFORM.y64, **CLOSE)
        requests.close()
