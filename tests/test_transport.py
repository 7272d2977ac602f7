"""Calls by a completion queue, and by threads where gRPC is not as it was; seen from the wire."""

import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from serving.failures import NO_MESSAGE, Failure
from serving.gate import Gate
from serving.room import Room
from serving.tensors import decode_inputs
from serving.transport import completion_queue, trial
from serving.transport.unary import UnaryMethod
from tests.conftest import STATE_DICTS
from tests.servers import WAIT_S, await_true, served
from tests.wire import raw_output, raw_request

UNIFORM = STATE_DICTS[0]
ONE_ROW = raw_request(UNIFORM.x[:1])
METHOD = "/inference.GRPCInferenceService/ModelInfer"


@contextmanager
def request_threads(repository: Path) -> Iterator[set[threading.Thread]]:
    """The threads for calls of a server that has answered one; those of others end slowly."""
    before = set(threading.enumerate())
    with served(repository) as (_, stub):
        stub.ModelInfer(raw_request(UNIFORM.x))
        new = set(threading.enumerate()) - before
        yield {thread for thread in new if thread.name.startswith("request")}


@pytest.mark.usefixtures("threads")
def test_answers_and_errors_are_the_same_either_way(repository: Path) -> None:
    with served(repository) as (_, stub):
        futures = [stub.ModelInfer.future(raw_request(UNIFORM.x[i : i + 1])) for i in range(50)]
        for i, future in enumerate(futures):
            found = raw_output(future.result(WAIT_S))
            np.testing.assert_allclose(found, UNIFORM.y64[i : i + 1], rtol=1e-5, atol=1e-5)
        for request, code in (
            (raw_request(UNIFORM.x, "none"), grpc.StatusCode.NOT_FOUND),
            (raw_request(UNIFORM.x[:, :3]), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(request)
            assert refused.value.code() is code


def test_this_grpcio_needs_no_threads(repository: Path) -> None:
    assert trial.is_usable()
    with request_threads(repository) as found:
        assert not found


def test_a_trial_does_not_fail_by_chance() -> None:
    for _ in range(50):  # one of four did
        trial._try()


def test_where_grpcio_is_another_calls_have_threads(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc, "__version__", "1.99.0")
    with changed(), request_threads(repository) as found:
        assert found


@contextmanager
def changed() -> Iterator[None]:
    """Have gRPC tried anew, now and afterwards."""
    trial.is_usable.cache_clear()
    try:
        yield
    finally:
        trial.is_usable.cache_clear()


class Broken:
    """A module of gRPC, as our code alone sees it, with one name that is another or gone."""

    def __init__(self, module: Any, name: str, *instead: Any) -> None:
        self._module, self._name, self._instead = module, name, instead

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            if not self._instead:
                raise AttributeError(name)
            return self._instead[0]
        return getattr(self._module, name)


PRIVATE = sorted(
    set(re.findall(r"\b(cygrpc|_server|_common)\.(\w+)", inspect.getsource(completion_queue)))
)
LAYOUTS: list[Any] = [(), (lambda *_: (None, 7),)]


def health(server: Any) -> str:
    with grpc.insecure_channel(server.address) as channel:
        request = health_pb2.HealthCheckRequest()
        status = HealthStub(channel).Check(request, timeout=WAIT_S).status
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["gone", "returns"])
@pytest.mark.parametrize(("module", "name"), PRIVATE)
def test_health_and_inference_live_whatever_grpc_changes(
    repository: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, layout: Any
) -> None:
    """It has changed before the server starts, or it changes while the server runs."""
    broken = Broken(getattr(completion_queue, module), name, *layout)
    with monkeypatch.context() as patched, changed():
        patched.setattr(completion_queue, module, broken)
        with served(repository) as (server, stub):
            assert raw_output(stub.ModelInfer(ONE_ROW, timeout=WAIT_S)).shape == (1, 3)
            assert health(server) == "SERVING"
    with monkeypatch.context() as patched, served(repository) as (server, stub):
        patched.setattr(completion_queue, module, broken)
        for _ in range(3):  # what is under way may fail, in a way that a client tries again
            with suppress(grpc.RpcError):
                stub.ModelInfer(ONE_ROW, timeout=WAIT_S)
        assert raw_output(stub.ModelInfer(ONE_ROW, timeout=WAIT_S)).shape == (1, 3)
        assert health(server) == "SERVING"


def test_where_no_way_is_left_the_server_is_not_live(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, served(repository) as (server, stub):
        for module, name in (
            ("cygrpc", "SendMessageOperation"),
            ("_server", "_request_registered_call"),
        ):
            broken = Broken(getattr(completion_queue, module), name)
            patched.setattr(completion_queue, module, broken)
        assert not server.is_stalled
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(ONE_ROW, timeout=WAIT_S)
        assert server.is_stalled


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        pytest.param([], {"UNIMPLEMENTED"}, id="none"),
        pytest.param([b"\xff\xff"], {"INVALID_ARGUMENT"}, id="no message"),
        pytest.param([b""], {"NOT_FOUND"}, id="empty"),
    ],
)
def test_calls_of_another_kind_are_answered(
    repository: Path, messages: list[bytes], code: set[str]
) -> None:
    with served(repository) as (server, stub), grpc.insecure_channel(server.address) as channel:
        call: Any = channel.stream_unary(METHOD)
        with pytest.raises(grpc.RpcError) as refused:
            call(iter(messages), timeout=WAIT_S)
        assert {refused.value.code().name} == code
        assert raw_output(stub.ModelInfer(raw_request(UNIFORM.x[:1]))).shape == (1, 3)


def test_calls_that_never_send_or_go_away_leave_their_places(repository: Path) -> None:
    with served(repository, max_requests=4) as (server, _):
        room = server.rooms["requests"]

        def nobody_is_here() -> bool:
            return not len(room)

        for end in ("cancel", "close"):
            await_true(nobody_is_here)  # who is answered leaves a moment later
            with grpc.insecure_channel(server.address) as channel:
                hold = threading.Event()

                def silent(hold: threading.Event = hold) -> Iterator[bytes]:
                    hold.wait(WAIT_S)
                    yield from ()

                method: Any = channel.stream_unary(METHOD)
                calls = [method.future(silent()) for _ in range(4)]
                await_true(lambda: len(room) == 4)
                if end == "cancel":
                    for call in calls:
                        call.cancel()
                    await_true(nobody_is_here)
                hold.set()
            await_true(nobody_is_here)


def test_what_fails_unforeseen_ends_the_call_and_not_the_server(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(repository) as (_, stub):
        with monkeypatch.context() as broken:
            broken.setattr("serving.rpc.is_compressed", lambda raw: 1 / 0)
            with pytest.raises(grpc.RpcError) as failed:
                stub.ModelInfer(raw_request(UNIFORM.x))
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert "division" not in str(failed.value.details())
        stub.ModelInfer(raw_request(UNIFORM.x))


def test_large_messages_of_unknown_headers_are_read_elsewhere(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []

    def watched(request: Any, expected: Any) -> Any:
        readers.append(threading.current_thread().name)
        return decode_inputs(request, expected)

    monkeypatch.setattr("serving.infer_request.decode_inputs", watched)
    with served(repository) as (_, stub):
        for rows in (1, 2**16, 2**16, 1):
            answer = stub.ModelInfer(raw_request(np.zeros((rows, 4), np.float32)))
            assert raw_output(answer).shape == (rows, 3)
    assert [name.startswith("reader") for name in readers] == [False, True]  # each header once


def test_an_answer_too_large_for_a_message_is_an_error_of_ours(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise ValueError("Message exceeds maximum protobuf size of 2GB")

    with served(repository) as (_, stub):
        with monkeypatch.context() as broken:
            broken.setattr("serving.infer_request.encode_outputs", fail)
            with pytest.raises(grpc.RpcError) as failed:
                stub.ModelInfer(raw_request(UNIFORM.x))
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert raw_output(stub.ModelInfer(raw_request(UNIFORM.x[:1]))).shape == (1, 3)


class Event:
    """What gRPC reports of a call."""

    def __init__(self, **answers: Any) -> None:
        self.success = True
        self.call = self.call_details = self
        self.deadline = float("inf")
        self.invocation_metadata = ()
        self.batch_operations = [self]
        for name, answer in answers.items():
            setattr(self, name, lambda answer=answer: answer)

    def start_server_batch(self, operations: Any, tag: Any) -> int:
        return 0

    def peer(self) -> bytes:
        return b"ipv4:192.0.2.1:1"


@pytest.mark.parametrize("order", [("closed", "received"), ("received", "closed")])
def test_a_call_without_a_message_is_counted_once_whatever_comes_first(
    order: tuple[str, str],
) -> None:
    counted: list[str] = []

    def refused(error: Exception) -> Failure:
        counted.append(type(error).__name__)
        return NO_MESSAGE

    room = Room(4, WAIT_S)
    gate = Gate(room, lambda caller: None, refused, lambda: 0.0, 100)
    transport: Any = SimpleNamespace(runs_short=False, forget=lambda call: None)
    call = completion_queue._Call(transport, UnaryMethod(gate, lambda *_: None), Event())
    assert room.enter(call)
    call.receive()
    events = {"closed": Event(cancelled=True), "received": Event(message=None)}
    for number, name in enumerate(order):
        getattr(call, name)(events[name])
        assert len(room) == 1 - number
    assert counted == ["Cancelled"]


def test_a_call_of_several_answers_hears_that_its_client_has_gone() -> None:
    """Also where the last answer is known before the first one has been sent."""
    started: list[Any] = []

    class Noting(Event):
        def start_server_batch(self, operations: Any, tag: Any) -> int:
            started.append(tag[0])
            return 0

    event = Noting()
    room = Room(4, WAIT_S)
    gate = Gate(room, lambda caller: None, lambda error: NO_MESSAGE, lambda: 0.0, 100)
    transport: Any = SimpleNamespace(
        runs_short=False, forget=lambda call: None, watch_soon=lambda call: None
    )
    call = completion_queue._Call(transport, UnaryMethod(gate, lambda *_: None), event)
    assert room.enter(call)
    call.receive()
    call.received(Event(message=b""))
    call.publish(b"")
    call.finish()
    gone = Event(cancelled=True)
    gone.success = False
    call.sent(gone)
    assert completion_queue._Call.closed in started
    call.closed(gone)
    assert len(room) == 0
