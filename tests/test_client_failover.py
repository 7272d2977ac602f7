"""Whom a client waits for, how long, and where it asks again: servers come, end and die."""

import signal
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from serving.client import KanClient, Overloaded, TimedOut
from serving.server import Server, running
from serving.settings import Settings
from tests.bare import A, Bare, N, answering
from tests.clients import ROWS, UNIFORM, assert_close, both_ways, infers, told_why
from tests.ports import free_port
from tests.processes import serving
from tests.servers import WAIT_S, Gate, await_true, gate, served

__all__ = ["gate", "told_why"]


def test_a_deadline_ends_the_wait(repository: Path, gate: Gate) -> None:
    with served(repository) as (server, _), KanClient(server.address) as client:
        client.metadata(UNIFORM.name)
        for rows in (1, 3000):  # in one message and in several
            with pytest.raises(TimedOut, match="model 'uniform_4x8x3'") as timed_out:
                client.infer(UNIFORM.name, np.zeros((rows, 4)), timeout_s=0.05)
            assert timed_out.value.code == "DEADLINE_EXCEEDED"


@pytest.mark.usefixtures("told_why")
def test_who_waits_for_nobody_is_told_why() -> None:
    with socket.socket() as taken:  # and does not listen
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for error in both_ways(address, "models", timeout_s=0.1):
            assert isinstance(error, TimedOut)
            assert f"no server has answered in time: {address}: " in str(error)
            assert "refused" in str(error)
        assert both_ways(address, "is_ready") == [False, False]


def test_calls_wait_for_a_server_that_comes_late(repository: Path) -> None:
    found: list[NDArray[Any]] = []
    port = free_port()
    with socket.socket() as knocked:
        knocked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        knocked.bind(("127.0.0.1", port))
        knocked.listen()
        client = KanClient(f"127.0.0.1:{port}", timeout_s=WAIT_S)
        asking = threading.Thread(
            target=lambda: found.append(client.infer(UNIFORM.name, UNIFORM.x))
        )
        asking.start()
        for _ in range(4):
            knocked.accept()[0].close()  # in vain, and more often than a call is asked again
    settings = Settings(model_repository=repository, grpc_port=port, metrics_port=0)
    with client, running(settings):
        asking.join(WAIT_S)
    assert_close(found[0], UNIFORM.y64)


def test_a_drained_server_is_left_for_the_other(repository: Path) -> None:
    with (
        served(repository) as (first, _),
        served(repository) as (second, _),
        KanClient([first.address, second.address]) as client,
    ):

        def asked(server: Server) -> float:
            before = infers(server)
            for _ in range(10):
                assert_close(client.infer(UNIFORM.name, UNIFORM.x), UNIFORM.y64)
            return infers(server) - before

        await_true(lambda: asked(first) == 5)  # turn by turn, once both are connected
        first.drain()
        await_true(lambda: asked(first) == 0)
        assert asked(second) == 10


def test_nothing_fails_while_one_of_two_servers_ends(repository: Path) -> None:
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(serving("--model-repository", repository, "--drain-s", "0.3"))
            for _ in range(2)
        )
        client = stack.enter_context(KanClient([first.address, second.address], timeout_s=WAIT_S))
        client.infer(UNIFORM.name, UNIFORM.x)
        first.popen.send_signal(signal.SIGTERM)
        calls = 0
        while first.popen.poll() is None or calls < 100:
            assert_close(client.infer(UNIFORM.name, UNIFORM.x), UNIFORM.y64)
            calls += 1
        assert first.popen.returncode == 0


def test_what_a_server_cancels_in_the_moment_of_its_end_is_asked_again() -> None:
    class Ending(Bare):
        def ModelInfer(
            self, request: pb.ModelInferRequest, context: grpc.ServicerContext
        ) -> pb.ModelInferResponse:
            if not self.requests:
                self.requests.append(request)
                context.abort(grpc.StatusCode.CANCELLED, "")
            return super().ModelInfer(request, context)

    servicer = Ending()
    with answering(servicer) as port, KanClient(f"127.0.0.1:{port}", timeout_s=WAIT_S) as client:
        found = client.infer("pair", {"a": A, "n": N}, output="twice")
    np.testing.assert_array_equal(found, 2 * A)
    assert len(servicer.requests) == 2


def test_what_a_killed_server_leaves_unanswered_is_asked_of_the_other(repository: Path) -> None:
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(serving("--model-repository", repository)) for _ in range(2)
        )
        client = stack.enter_context(KanClient([first.address, second.address], timeout_s=WAIT_S))
        client.infer(UNIFORM.name, UNIFORM.x)
        first.popen.kill()
        for _ in range(100):
            assert_close(client.infer(UNIFORM.name, UNIFORM.x), UNIFORM.y64)


def test_a_batch_of_many_messages_waits_for_room(repository: Path, gate: Gate) -> None:
    with (
        served(repository, max_requests=1, engine_slots=1) as (server, _),
        KanClient(server.address) as client,
    ):
        client.metadata(UNIFORM.name)
        found: list[NDArray[Any]] = []
        asking = threading.Thread(target=lambda: found.append(client.infer(UNIFORM.name, ROWS)))
        asking.start()
        gate.await_run()
        with pytest.raises(Overloaded) as refused:  # a single message is its caller's to repeat
            client.infer(UNIFORM.name, ROWS[:1])
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s > 0
        gate.opened.set()
        asking.join(WAIT_S)
        assert found[0].shape == (2500, 3)
