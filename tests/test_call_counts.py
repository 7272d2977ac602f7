"""Every call is counted once: by its method, its status, and the reason if it has no answer."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import Server
from serving.transport import trial
from tests.conftest import STATE_DICTS
from tests.frames import Frames, frames
from tests.security import write_access
from tests.servers import await_true, served
from tests.test_strangers import FORMS
from tests.wire import raw_request

MIB = 2**20
UNIFORM = STATE_DICTS[0]
ROW = raw_request(UNIFORM.x[:1]).SerializeToString()
SERVICE, HEALTH = "/inference.GRPCInferenceService", "/grpc.health.v1.Health"
INFER, STREAM, READY = (
    f"{SERVICE}/ModelInfer",
    f"{SERVICE}/ModelStreamInfer",
    f"{SERVICE}/ModelReady",
)
CHECK, WATCH = f"{HEALTH}/Check", f"{HEALTH}/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

Counts = Counter[tuple[str, ...]]
Act = Callable[[Frames, Server], object]


def counts(server: Server) -> Counts:
    """Calls by method and status, and refusals by reason."""
    found: Counts = Counter()
    for family in server.registry.collect():
        for sample in family.samples:
            if sample.name in ("kanserve_calls_total", "kanserve_refusals_total"):
                found[tuple(sample.labels.values())] += int(sample.value)
    return +found


def someone_is_here(server: Server) -> bool:
    return any(map(len, server.rooms.values()))


def sending(method: str, content: bytes = b"", *, compressed: bool = False) -> Act:
    """Send a message and wait for the end."""

    def act(client: Frames, server: Server) -> None:
        client.send(client.call(method), content, compressed=compressed)
        client.statuses(1)

    return act


def ending(method: str) -> Act:
    """Send nothing and end."""

    def act(client: Frames, server: Server) -> None:
        client.h2.end_stream(client.call(method))
        client.flush()
        client.statuses(1)

    return act


def cancelling(method: str, size: int = 0) -> Act:
    """Send a part of a message, or nothing, and cancel."""

    def act(client: Frames, server: Server) -> None:
        call = client.call(method)
        if size:
            client.send(call, bytes(size), compressed=False, claimed=2 * size)
        await_true(lambda: someone_is_here(server))  # gRPC reports no call that ends sooner
        client.cancel(call)

    return act


def leaving(method: str) -> Act:
    """Send a part of a message, and close the connection."""

    def act(client: Frames, server: Server) -> None:
        client.send(client.call(method), bytes(1000), compressed=False, claimed=2000)
        await_true(lambda: someone_is_here(server))  # what is not read is lost with the connection
        client.socket.close()

    return act


def waiting(method: str) -> Act:
    """Send headers alone, until the server ends the call."""

    def act(client: Frames, server: Server) -> None:
        client.call(method)
        client.statuses(1)

    return act


def watching(client: Frames, _: Server) -> None:
    call = client.call(WATCH)
    client.send(call, b"", compressed=False)
    while not any(type(event).__name__ == "DataReceived" for event in client.read()):
        pass
    client.cancel(call)


LARGE = bytes(2 * MIB)
BOMB = FORMS["gzip"](LARGE)
CASES: list[tuple[str, Act, str, str, str | None]] = [
    ("an answer", sending(INFER, ROW), "ModelInfer", "OK", None),
    (
        "a message that is none",
        sending(INFER, b"\xff"),
        "ModelInfer",
        "INVALID_ARGUMENT",
        "invalid",
    ),
    (
        "one that is too large",
        sending(INFER, LARGE),
        "ModelInfer",
        "RESOURCE_EXHAUSTED",
        "too_large",
    ),
    (
        *("one that becomes too large", sending(INFER, BOMB, compressed=True)),
        *("ModelInfer", "RESOURCE_EXHAUSTED", "too_large"),
    ),
    (
        *("one that is too large for its method", sending(READY, bytes(MIB // 2))),
        *("ModelReady", "RESOURCE_EXHAUSTED", "too_large"),
    ),
    ("none", ending(INFER), "ModelInfer", "UNIMPLEMENTED", "invalid"),
    ("cancelled unread", cancelling(INFER), "ModelInfer", "CANCELLED", "cancelled"),
    ("cancelled while read", cancelling(INFER, 1000), "ModelInfer", "CANCELLED", "cancelled"),
    ("gone while read", leaving(INFER), "ModelInfer", "CANCELLED", "cancelled"),
    ("late", waiting(INFER), "ModelInfer", "DEADLINE_EXCEEDED", "expired"),
    ("about a model", sending(READY, b"\x0a\x01x"), "ModelReady", "NOT_FOUND", "invalid"),
    ("cancelled about a model", cancelling(READY, 9), "ModelReady", "CANCELLED", "cancelled"),
    (
        *("one that is not offered", waiting(f"{SERVICE}/TraceSetting")),
        *("TraceSetting", "UNIMPLEMENTED", "invalid"),
    ),
    (
        *("an unknown method", sending(f"{SERVICE}/Nothing")),
        *("unknown", "UNIMPLEMENTED", "unknown_method"),
    ),
    (
        *("an unknown service", sending("/a.B/c")),
        *("unknown", "UNIMPLEMENTED", "unknown_method"),
    ),
    ("a message of a stream", sending(STREAM, ROW), "ModelStreamInfer", "OK", None),
    (
        *("a stream's that is too large", sending(STREAM, LARGE)),
        *("ModelStreamInfer", "RESOURCE_EXHAUSTED", "too_large"),
    ),
    (
        *("a stream that is cancelled", cancelling(STREAM, 1000)),
        *("ModelStreamInfer", "CANCELLED", "cancelled"),
    ),
    ("a check", sending(CHECK), "Check", "OK", None),
    ("a check of nothing", sending(CHECK, b"\x0a\x01x"), "Check", "NOT_FOUND", "invalid"),
    (
        "a check that is too large",
        sending(CHECK, LARGE),
        "Check",
        "RESOURCE_EXHAUSTED",
        "too_large",
    ),
    ("a check that is cancelled", cancelling(CHECK, 9), "Check", "CANCELLED", "cancelled"),
    ("a watch", watching, "Watch", "CANCELLED", None),
    ("a watch of nothing", sending(WATCH, b"\x0a\x01x"), "Watch", "OK", None),
    ("a watch that is none", sending(WATCH, b"\xff"), "Watch", "INVALID_ARGUMENT", "invalid"),
    ("a watch that is cancelled", cancelling(WATCH, 9), "Watch", "CANCELLED", "cancelled"),
    ("reflection", sending(REFLECTION, b"\x3a\x00"), "ServerReflectionInfo", "OK", None),
    (
        *("reflection that is none", sending(REFLECTION, b"\xff")),
        *("ServerReflectionInfo", "INVALID_ARGUMENT", "invalid"),
    ),
    (
        *("reflection that is too large", sending(REFLECTION, LARGE)),
        *("ServerReflectionInfo", "RESOURCE_EXHAUSTED", "too_large"),
    ),
    (
        *("reflection that is cancelled", cancelling(REFLECTION, 9)),
        *("ServerReflectionInfo", "CANCELLED", "cancelled"),
    ),
]
# gRPC may tell that there are no more messages before it tells that the stream is cancelled.
EITHER_WAY = {"a stream that is cancelled", "reflection that is cancelled"}
# gRPC's public side does not tell a message that is too large from one that is cancelled.
UNKNOWN_IN_THREADS = {"one that is too large", "a check that is too large"}
UNKNOWN_IN_THREADS |= {"a stream's that is too large", "reflection that is too large"}


def test_every_call_is_counted_once_however_it_ends(repository: Path, threads: bool) -> None:
    with served(repository, max_message_bytes=MIB, receive_timeout_s=2.0) as (server, _):
        for name, act, method, code, reason in CASES:
            if threads and (
                name in UNKNOWN_IN_THREADS or code in ("CANCELLED", "DEADLINE_EXCEEDED")
            ):
                continue  # gRPC's public side tells neither when nor why a call has ended early
            before = counts(server)
            with frames(server.address) as client:
                act(client, server)
                await_true(lambda before=before: counts(server) != before)  # type: ignore[misc]
                await_true(lambda: not someone_is_here(server))
            wanted: Counts = Counter({(method, code): 1})
            if reason is not None:
                wanted[reason,] = 1
            found = counts(server) - before
            if name in EITHER_WAY and found != wanted:
                wanted = Counter({(method, "OK"): 1})
            assert found == wanted, name


def test_messages_that_are_too_large_are_counted_in_threads_too(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "is_usable", lambda: False)
    with served(repository, max_message_bytes=MIB) as (server, _):
        for name, act, method, *_ in CASES:
            if name in UNKNOWN_IN_THREADS:
                before = counts(server)
                with frames(server.address) as client:
                    act(client, server)
                    await_true(lambda before=before: counts(server) != before)  # type: ignore[misc]
                found = counts(server) - before
                assert found.total() in (1, 2), name  # by its status, and by a reason if it has one
                assert {key[0] for key in found if len(key) == 2} == {method}


def test_calls_at_the_port_of_health_are_counted(repository: Path) -> None:
    with served(repository, health_port=0) as (server, _), frames(server.health_address) as client:
        sending(CHECK)(client, server)
        sending(CHECK, bytes(MIB))(client, server)
        sending(INFER, ROW)(client, server)
        await_true(lambda: counts(server).total() == 5)
        assert counts(server) == {
            ("Check", "OK"): 1,
            ("Check", "RESOURCE_EXHAUSTED"): 1,
            ("too_large",): 1,
            ("unknown", "UNIMPLEMENTED"): 1,
            ("unknown_method",): 1,
        }


def test_who_is_refused_at_the_door_is_counted_by_why(repository: Path, tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", tokens={"inference": ["reader"]})
    with served(repository, access=access) as (server, _), frames(server.address) as client:
        for method in (INFER, STREAM, READY):
            waiting(method)(client, server)
        assert counts(server) == {
            ("ModelInfer", "UNAUTHENTICATED"): 1,
            ("ModelStreamInfer", "UNAUTHENTICATED"): 1,
            ("ModelReady", "UNAUTHENTICATED"): 1,
            ("unauthorised",): 3,
        }
    with served(repository, max_message_bytes=MIB) as (server, _), frames(server.address) as client:
        server.budget.take(server.budget.limit)
        for method in (INFER, STREAM):
            waiting(method)(client, server)
        assert counts(server) == {
            ("ModelInfer", "RESOURCE_EXHAUSTED"): 1,
            ("ModelStreamInfer", "RESOURCE_EXHAUSTED"): 1,
            ("memory",): 2,
        }
    with served(repository, max_streams=1, max_peer_share=1) as (server, stub):
        kept = stub.ModelStreamInfer(
            itertools.chain([pb.ModelInferRequest.FromString(ROW)], iter(threading.Event().wait, 0))
        )
        next(iter(kept))
        with frames(server.address) as client:
            waiting(STREAM)(client, server)
        assert counts(server)["shed",] == 1
        kept.cancel()


def test_names_of_methods_that_are_unknown_are_no_labels(repository: Path) -> None:
    with served(repository) as (server, _), grpc.insecure_channel(server.address) as channel:
        for i in range(50):
            call: Any = channel.unary_unary(f"/service{i}/method")
            with pytest.raises(grpc.RpcError):
                call(b"")
        assert counts(server) == {("unknown", "UNIMPLEMENTED"): 50, ("unknown_method",): 50}


def test_watches_that_the_server_ends_are_counted(repository: Path) -> None:
    with served(repository) as (server, stub), grpc.insecure_channel(server.address) as channel:
        assert isinstance(stub, GRPCInferenceServiceStub)
        begin: Any = channel.unary_stream(WATCH)
        watch = begin(b"")
        next(watch)
        server.stop(5.0, lambda: False)
        list(watch)
        await_true(lambda: counts(server)["Watch", "OK"] == 1)
