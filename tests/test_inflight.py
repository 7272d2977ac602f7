"""The budget of bytes on real servers: it is kept, and given back after every kind of end."""

import gzip
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.budget import ANSWER_COPIES, MESSAGE_COPIES
from serving.server import Server
from tests.conftest import STATE_DICTS
from tests.frames import Frames, frames
from tests.processes import Process, serving
from tests.servers import WAIT_S, Gate, await_true, gate, served
from tests.wire import raw_output, raw_request

__all__ = ["gate"]

MIB = 2**20
UNIFORM = STATE_DICTS[0]
ROW = raw_request(UNIFORM.x[:1])
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
CHECK = "/grpc.health.v1.Health/Check"
PUSHBACK = "grpc-retry-pushback-ms"


def held(server: Server) -> float:
    found = server.registry.get_sample_value("kanserve_inflight_bytes")
    assert found is not None
    return found


def rows_of(size: int) -> pb.ModelInferRequest:
    """A request of so many bytes, about."""
    return raw_request(np.zeros((size // 16, 4), np.float32))


def answered(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    assert raw_output(stub.ModelInfer(ROW, timeout=WAIT_S)).shape == (1, 3)


def expect_refusal(client: Frames) -> None:
    """Read how a call ends that is too large: by threads, one may be cancelled for its memory."""
    assert client.statuses(1)[0] in ("8", "1")


def invalid(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    client.send(client.call(INFER), b"\xff" * 1000, compressed=False)
    assert client.statuses(1) == ["3"]


def too_large(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    client.send(client.call(INFER), bytes(2 * MIB), compressed=False)
    expect_refusal(client)


def small_that_becomes_too_large(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    client.send(client.call(INFER), gzip.compress(bytes(2 * MIB)), compressed=True)
    expect_refusal(client)


def compressed(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    content = gzip.compress(rows_of(MIB // 2).SerializeToString())
    client.send(client.call(INFER), content, compressed=True)
    client.statuses(1)


def too_large_for_its_method(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    for method in ("ModelReady", "RepositoryIndex", "ServerLive"):
        client.send(client.call(INFER.replace("ModelInfer", method)), bytes(MIB), compressed=False)
        expect_refusal(client)


def without_a_message(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    client.h2.end_stream(client.call(INFER))
    client.flush()
    assert client.statuses(1) == ["12"]


def cancelled_half_sent(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    call = client.call(INFER)
    client.send(call, bytes(50_000), compressed=False, claimed=100_000)
    client.cancel(call)


def half_sent_and_gone(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    client.send(client.call(INFER), bytes(50_000), compressed=False, claimed=100_000)
    client.socket.close()


def cancelled_while_it_runs(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    for _ in range(20):
        call = client.call(INFER)
        client.send(call, rows_of(MIB // 4).SerializeToString(), compressed=False)
        client.cancel(call)


def cancelled_before_it_is_inflated(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    content = gzip.compress(rows_of(MIB // 2).SerializeToString())
    for _ in range(20):
        call = client.call(INFER)
        client.send(call, content, compressed=True)
        client.cancel(call)


def gone_without_the_answer(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    client.h2.update_settings({4: 0})  # SETTINGS_INITIAL_WINDOW_SIZE
    client.flush()
    client.send(client.call(INFER), ROW.SerializeToString(), compressed=False)
    client.socket.close()


def streamed(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    answers = list(stub.ModelStreamInfer(iter([ROW] * 5), timeout=WAIT_S))
    assert len(answers) == 5


def stream_with_one_too_large(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    client.send(client.call(STREAM), bytes(2 * MIB), compressed=False)
    expect_refusal(client)


def stream_that_is_cancelled(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    responses = stub.ModelStreamInfer(itertools.chain([ROW], iter(threading.Event().wait, 0)))
    next(iter(responses))
    responses.cancel()


def stream_that_is_gone(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    client.send(client.call(STREAM), bytes(50_000), compressed=False, claimed=100_000)
    client.socket.close()


def checked(client: Frames, stub: GRPCInferenceServiceStub) -> None:
    client.send(client.call(CHECK), b"", compressed=False)
    assert client.statuses(1) == ["0"]
    client.send(client.call(CHECK), bytes(MIB), compressed=False)
    expect_refusal(client)


ENDS: list[Callable[[Frames, GRPCInferenceServiceStub], None]] = [
    *(answered, invalid, too_large, small_that_becomes_too_large, compressed),
    *(too_large_for_its_method, without_a_message, cancelled_half_sent, half_sent_and_gone),
    *(cancelled_while_it_runs, cancelled_before_it_is_inflated, gone_without_the_answer),
    *(streamed, stream_with_one_too_large, stream_that_is_cancelled, stream_that_is_gone, checked),
]


@pytest.mark.usefixtures("threads")
def test_bytes_are_given_back_after_every_kind_of_end(repository: Path) -> None:
    limits = {"max_message_bytes": MIB, "max_inflight_bytes": 3 * MIB, "receive_timeout_s": 5.0}
    with served(repository, **limits) as (server, stub):
        for end in ENDS:
            with frames(server.address) as client:
                end(client, stub)
                await_true(lambda: not any(map(len, server.rooms.values())))
                assert server.budget.held == 0, end.__name__
                await_true(lambda: held(server) == 0)
            answered(client, stub)


@pytest.mark.usefixtures("threads")
def test_requests_beyond_the_budget_are_refused_and_told_when_to_come_again(
    repository: Path, gate: Gate
) -> None:
    limits = {"max_message_bytes": MIB, "max_inflight_bytes": 3 * MIB, "max_queue_rows": 10**6}
    with (
        served(repository, **limits) as (server, stub),
        grpc.insecure_channel(server.address) as channel,
    ):
        size, large = rows_of(MIB // 4).ByteSize(), rows_of(MIB * 3 // 5)
        kept = [stub.ModelInfer.future(rows_of(MIB // 4)) for _ in range(2)]
        await_true(lambda: held(server) == 2 * MESSAGE_COPIES * size)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(large, timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing: Any = refused.value.trailing_metadata()
        assert PUSHBACK in dict(trailing)
        (answer,) = stub.ModelStreamInfer(iter([large]), timeout=WAIT_S)
        assert "as many bytes" in answer.error_message
        last = stub.ModelInfer.future(rows_of(MIB * 2 // 5))  # what has room is taken in
        await_true(lambda: held(server) > 2.5 * MIB)
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=WAIT_S).ready
        assert stub.ModelReady(pb.ModelReadyRequest(name=UNIFORM.name), timeout=WAIT_S).ready
        check: Any = channel.unary_unary(CHECK)
        assert health_pb2.HealthCheckResponse.FromString(check(b"", timeout=WAIT_S)).status == 1
        gate.opened.set()
        for future in (*kept, last):
            future.result(WAIT_S)
        await_true(lambda: held(server) == 0)
        stub.ModelInfer(large, timeout=WAIT_S)
        refusals = server.registry.get_sample_value("kanserve_refusals_total", {"reason": "memory"})
        assert refusals == 2


def test_a_full_server_refuses_before_a_message_is_read(repository: Path, gate: Gate) -> None:
    limits = {"max_message_bytes": MIB, "max_inflight_bytes": 3 * MIB, "max_queue_rows": 10**6}
    with served(repository, **limits) as (server, stub), frames(server.address) as client:
        kept = stub.ModelInfer.future(rows_of(MIB - 200))
        gate.await_run()
        rest = 3 * MIB - MESSAGE_COPIES * rows_of(MIB - 200).ByteSize()
        assert server.budget.take(rest)  # to the byte, which no message is
        for method in (INFER, STREAM):
            client.call(method)
            assert client.statuses(1) == ["8"]  # though no message has been sent
        server.budget.give_back(rest)
        gate.opened.set()
        kept.result(WAIT_S)


def test_what_is_inflated_counts(repository: Path, gate: Gate) -> None:
    request = rows_of(MIB // 2)
    content = gzip.compress(request.SerializeToString())
    limits = {"max_message_bytes": MIB, "max_inflight_bytes": 3 * MIB, "max_queue_rows": 10**6}
    with served(repository, **limits) as (server, _), frames(server.address) as client:
        client.h2.update_settings({4: 2**24})  # SETTINGS_INITIAL_WINDOW_SIZE
        client.h2.increment_flow_control_window(2**24)
        client.flush()
        client.send(client.call(INFER), content, compressed=True)
        gate.await_run()
        assert held(server) == MESSAGE_COPIES * (len(content) + request.ByteSize())
        client.send(client.call(INFER), content, compressed=True)
        assert client.statuses(1) == ["8"]
        gate.opened.set()
        assert client.statuses(1) == ["0"]


@pytest.mark.usefixtures("threads")
def test_answers_count_until_they_are_taken(repository: Path) -> None:
    with served(repository, max_message_bytes=MIB) as (server, stub), frames(server.address) as c:
        answer = stub.ModelInfer(rows_of(2**16)).ByteSize()
        c.h2.update_settings({4: 0})  # SETTINGS_INITIAL_WINDOW_SIZE
        c.h2.increment_flow_control_window(2**24)
        c.flush()
        calls = [c.call(INFER) for _ in range(3)]
        for call in calls:
            c.send(call, rows_of(2**16).SerializeToString(), compressed=False)
        await_true(lambda: held(server) == 3 * ANSWER_COPIES * answer)
        c.h2.update_settings({4: 2**20})
        c.flush()
        assert c.statuses(3) == ["0"] * 3
        await_true(lambda: held(server) == 0)


def test_a_watch_outlasts_the_time_in_which_answers_must_be_taken(repository: Path) -> None:
    with (
        served(repository, receive_timeout_s=0.1) as (server, _),
        grpc.insecure_channel(server.address) as channel,
        frames(server.address) as silent,
    ):
        begin: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
        watch = begin(b"")
        next(watch)
        for _ in range(2):  # calls that came after it have ended for their time
            silent.call(INFER)
            assert silent.statuses(1) == ["4"]
        assert watch.is_active()
        watch.cancel()


# In a process of its own: what it holds at most is what the kernel says.


def status(process: Process, name: str) -> int:
    """A line of Linux's /proc/PID/status, in bytes."""
    text = Path(f"/proc/{process.popen.pid}/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


BUDGET = 96 * MIB
ALLOWANCE = 100 * 10**6  # beside the budget


@pytest.fixture
def bounded(repository: Path) -> Iterator[tuple[Process, Callable[[], int]]]:
    """A server in a process, and how much memory it has held more than when it was ready."""
    flags = ["--max-message-bytes", 4 * MIB, "--max-inflight-bytes", BUDGET]
    queue = ["--max-queue-rows", 10**8, "--max-queue-bytes", 2**30]
    arguments = ["--model-repository", *map(str, (repository, *flags, *queue))]
    with serving(*arguments) as process, grpc.insecure_channel(process.address) as channel:
        GRPCInferenceServiceStub(channel).ModelInfer(ROW, timeout=WAIT_S)
        Path(f"/proc/{process.popen.pid}/clear_refs").write_text("5")  # VmHWM from now on
        before = status(process, "VmRSS")
        yield process, lambda: status(process, "VmHWM") - before


def test_400_requests_of_4_mib_at_a_time_keep_the_budget(
    bounded: tuple[Process, Callable[[], int]],
) -> None:
    process, grown = bounded
    content = rows_of(4 * MIB - 4096).SerializeToString()
    options = [("grpc.use_local_subchannel_pool", 1)]
    with ThreadPoolExecutor(8) as pool:
        channels = [grpc.insecure_channel(process.address, options) for _ in range(8)]
        calls: list[Any] = [channel.unary_unary(INFER) for channel in channels]
        futures = list(pool.map(lambda i: calls[i % 8].future(content), range(400)))
        codes = [future.code() for future in futures]
        for channel in channels:
            channel.close()
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert grown() < BUDGET + ALLOWANCE
    with grpc.insecure_channel(process.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert raw_output(stub.ModelInfer(ROW, timeout=WAIT_S)).shape == (1, 3)


def is_answered(stub: GRPCInferenceServiceStub) -> bool:
    try:
        stub.ModelInfer(ROW, timeout=WAIT_S)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        return False
    return True


@pytest.mark.parametrize("connections", [1, 64])
@pytest.mark.parametrize("claimed", [4 * MIB, 2**30])
def test_messages_that_are_half_sent_keep_the_budget(
    bounded: tuple[Process, Callable[[], int]], connections: int, claimed: int
) -> None:
    """512 of one megabyte each; gRPC would take as much of each as it claims to have."""
    process, grown = bounded

    def send(clients: list[Frames]) -> None:
        part = bytes(MIB)
        for client in clients:
            client.socket.settimeout(WAIT_S)
        for _ in range(512 // connections):
            for client in clients:
                call = client.call(INFER)
                with suppress(Exception):  # it was ended, or another call of the connection
                    client.send(call, part, compressed=False, claimed=claimed)

    with ThreadPoolExecutor(8) as pool:
        clients = [Frames(process.address) for _ in range(connections)]
        list(pool.map(send, ([client] for client in clients)))
        with grpc.insecure_channel(process.address) as channel:
            stub = GRPCInferenceServiceStub(channel)
            await_true(lambda: is_answered(stub))
        assert grown() < BUDGET + ALLOWANCE
        for client in clients:
            client.socket.close()
