"""Who is not known cannot keep others out, take memory, or be listened to for long."""

import gzip
import resource
import subprocess
import sys
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.errors import InvalidRequest
from serving.messages import PROBE_BYTES, inflate, is_compressed, parse
from serving.room import Places, Room, peer_of
from tests import strangers
from tests.conftest import STATE_DICTS
from tests.frames import frames
from tests.intruder import kinds
from tests.processes import serving
from tests.security import bearer, write_access
from tests.servers import WAIT_S, await_true, served
from tests.wire import raw_output, raw_request, typed_request

UNIFORM = STATE_DICTS[0]
ROW = raw_request(UNIFORM.x[:1])
INFERENCE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
UNARY = [
    f"/{INFERENCE}/{name}"
    for name in ("ServerLive", "ServerReady", "ModelInfer", "ModelReady", "ModelStatistics")
] + [f"/{HEALTH}/Check", f"/{HEALTH}/Watch"]
STREAMS = [f"/{INFERENCE}/ModelStreamInfer", f"/{REFLECTION}/ServerReflectionInfo"]
FORMS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


def outcome(channel: grpc.Channel, method: str, content: bytes) -> str:
    """Send a message as it is, so that no header says what it is, and tell how the call ends."""
    call: Any = channel.stream_stream(method)
    try:
        answers = list(call(iter([content]), timeout=WAIT_S))
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code.name
    if method == STREAMS[0]:
        return str(pb.ModelStreamInferResponse.FromString(answers[0]).error_message)
    return "OK"


@pytest.mark.usefixtures("threads")
def test_small_bytes_that_become_large_are_refused_by_every_method(repository: Path) -> None:
    """They are inflated to the limit and no further, whatever the method and the form."""
    bombs = [compress(bytes(2**28)) for compress in FORMS.values()]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        served(repository, max_message_bytes=2**20, health_port=0) as (server, stub),
        grpc.insecure_channel(server.address) as channel,
        grpc.insecure_channel(server.health_address) as health_channel,
    ):
        for bomb in bombs:
            for method in UNARY + STREAMS[1:]:
                assert outcome(channel, method, bomb) == "RESOURCE_EXHAUSTED", method
            assert "at most 1048576 bytes" in outcome(channel, STREAMS[0], bomb)
            for method in UNARY[-2:]:
                assert outcome(health_channel, method, bomb) == "RESOURCE_EXHAUSTED", method
        assert raw_output(stub.ModelInfer(ROW)).shape == (1, 3)
    # KiB: what made them took more memory than the server did.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most + 100 * 1024


@pytest.mark.parametrize("form", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_honest_compression_is_understood(repository: Path, form: grpc.Compression) -> None:
    rows = raw_request(UNIFORM.x)
    with (
        served(repository) as (server, stub),
        grpc.insecure_channel(server.address, compression=form) as channel,
    ):
        compressed = GRPCInferenceServiceStub(channel)
        assert compressed.ServerLive(pb.ServerLiveRequest()).live
        assert compressed.ModelReady(pb.ModelReadyRequest(name=UNIFORM.name)).ready
        assert compressed.ModelInfer(rows) == stub.ModelInfer(rows)
        (streamed,) = compressed.ModelStreamInfer(iter([rows]))
        assert streamed.infer_response.raw_output_contents == (
            stub.ModelInfer(rows).raw_output_contents
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_message_is_inflated_whole_or_not_at_all(form: str) -> None:
    content = ROW.SerializeToString()
    small = FORMS[form](content)
    assert inflate(small, len(content)) == content == inflate(content, len(content))
    for wrong, limit in ((small, len(content) - 1), (content, len(content) - 1)):
        with pytest.raises(Exception, match=f"at most {limit} bytes"):
            inflate(wrong, limit)
    for damaged in (small[:-1], small + b"more", small[:2], small[:12] + bytes(20)):
        with pytest.raises(Exception, match="cannot be inflated"):
            inflate(damaged, 2**20)


@pytest.mark.parametrize("limit", [PROBE_BYTES, 2**22])
def test_blocks_that_hold_nothing_are_not_inflated_on_and_on(limit: int) -> None:
    """They cost the processor a second for each megabyte, and never reach a limit."""
    empty = zlib.compressobj(wbits=-15)
    block = empty.flush(zlib.Z_FULL_FLUSH) + b"\0\0\0\xff\xff"  # stored, of no bytes
    content = b"\x78\x9c" + block * (2**20 // len(block))
    with pytest.raises(Exception, match="cannot be inflated"):
        inflate(content, limit)


@pytest.mark.parametrize(
    "change",
    [
        lambda request: [request.inputs.add() for _ in range(2**14)],
        lambda request: [request.outputs.add() for _ in range(2**14)],
        lambda request: request.raw_input_contents.extend([b""] * 2**14),
        lambda request: request.inputs[0].contents.bytes_contents.extend([b""] * 2**14),
        lambda request: request.inputs[0].shape.extend([1] * 2**14),
        lambda request: [request.parameters[str(i)].ParseFromString(b"") for i in range(2**14)],
    ],
    ids=["inputs", "outputs", "raw", "bytes", "shape", "parameters"],
)
def test_many_small_parts_are_not_parsed(change: Callable[[pb.ModelInferRequest], Any]) -> None:
    request = pb.ModelInferRequest.FromString(ROW.SerializeToString())
    change(request)
    with pytest.raises(InvalidRequest, match=r"expected a (request|shape) of"):
        parse(pb.ModelInferRequest, request.SerializeToString(), 2**26)


def test_large_requests_are_parsed() -> None:
    rows = raw_request(np.zeros((2**16, 4), np.float32))
    typed = typed_request(np.zeros((2**12, 4), np.float32))
    for request in (rows, typed):
        assert parse(pb.ModelInferRequest, request.SerializeToString(), 2**26) == request


def test_no_message_of_ours_begins_as_a_compressed_one_does() -> None:
    """The first byte holds the number and the kind of a field; RFC 1950 and 1952 say the rest."""
    kinds = {"varint": 0, "fixed64": 1, "bytes": 2, "fixed32": 5}
    services = [
        pb.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
    ]
    for method in (method for service in services for method in service.methods):
        for field in method.input_type.fields:
            of_field = (kinds["bytes"], _kind(field, kinds))
            for kind in of_field:
                start = field.number << 3 | kind
                assert not any(is_compressed(bytes([start, second])) for second in range(256))


def _kind(field: Any, kinds: dict[str, int]) -> int:
    if field.cpp_type in (field.CPPTYPE_STRING, field.CPPTYPE_MESSAGE):
        return kinds["bytes"]
    if field.cpp_type == field.CPPTYPE_DOUBLE:
        return kinds["fixed64"]
    return kinds["fixed32"] if field.cpp_type == field.CPPTYPE_FLOAT else kinds["varint"]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("method", UNARY)
def test_calls_that_send_no_message_keep_nobody_out(repository: Path, method: str) -> None:
    with (
        served(repository, max_requests=16, max_message_bytes=2**24) as (server, stub),
        grpc.insecure_channel(server.address) as channel,
        frames(server.address) as silent,
        frames(server.address, "127.0.0.2") as slow,
    ):
        begun = slow.call(UNARY[5])  # its message comes when all others have
        for _ in range(300):
            silent.call(method)
        await_true(
            lambda: any(4 * room.silent >= 3 * room.most_silent for room in server.rooms.values())
        )
        for _ in range(5):
            assert stub.ServerReady(pb.ServerReadyRequest(), timeout=WAIT_S).ready
            assert raw_output(stub.ModelInfer(ROW, timeout=WAIT_S)).shape == (1, 3)
            assert stub.ModelReady(pb.ModelReadyRequest(name=UNIFORM.name), timeout=WAIT_S).ready
            check: Any = channel.unary_unary(f"/{HEALTH}/Check")
            assert health_pb2.HealthCheckResponse.FromString(check(b"", timeout=WAIT_S)).status == 1
        slow.send(begun, b"", compressed=False)
        assert slow.statuses(1) == ["0"]


def test_answers_that_nobody_takes_hold_their_places_for_a_while(repository: Path) -> None:
    with (
        served(repository, max_requests=8, receive_timeout_s=0.1) as (server, stub),
        frames(server.address) as rude,
    ):
        rude.h2.update_settings({4: 0})  # SETTINGS_INITIAL_WINDOW_SIZE
        rude.flush()
        for _ in range(20):
            rude.send(rude.call(UNARY[2]), ROW.SerializeToString(), compressed=False)
        assert raw_output(stub.ModelInfer(ROW, timeout=WAIT_S)).shape == (1, 3)
        await_true(lambda: not any(map(len, server.rooms.values())))


def test_calls_that_send_no_message_in_time_are_ended(repository: Path) -> None:
    with (
        served(repository, receive_timeout_s=0.1, max_message_bytes=2**20) as (server, stub),
        frames(server.address) as silent,
    ):
        for method in UNARY:
            silent.call(method)
        assert silent.statuses(len(UNARY)) == ["4"] * len(UNARY)  # DEADLINE_EXCEEDED
        silent.call(STREAMS[1])  # which may last, but not without asking anything
        assert silent.statuses(1) == ["1"]  # CANCELLED
        assert raw_output(stub.ModelInfer(ROW)).shape == (1, 3)
        await_true(lambda: not any(map(len, server.rooms.values())))


def test_who_may_not_call_is_refused_before_it_takes_a_place(
    repository: Path, tmp_path: Path
) -> None:
    """Also where certificates matter, which are not known before a call is there."""
    access = write_access(
        tmp_path / "access.toml",
        tokens={"inference": ["reader"]},
        certificates={"admin": ["operator.example"]},
    )
    control = {"model_control": "explicit", "load_models": (UNIFORM.name,)}
    with (
        served(repository, access=access, max_requests=4, **control) as (server, stub),
        frames(server.address) as stranger,
    ):
        for method in (*UNARY[2:5], STREAMS[0], f"/{INFERENCE}/RepositoryModelLoad"):
            stranger.call(method)
            assert stranger.statuses(1) == ["16"], method  # UNAUTHENTICATED, and nothing was sent
        for _ in range(20):
            stranger.call(UNARY[2])
        assert stranger.statuses(20) == ["16"] * 20
        assert raw_output(stub.ModelInfer(ROW, metadata=bearer("reader"))).shape == (1, 3)
        load = pb.RepositoryModelLoadRequest(model_name=UNIFORM.name)
        with pytest.raises(grpc.RpcError) as refused:
            stub.RepositoryModelLoad(load, metadata=bearer("reader"))
        assert "[admin]" in str(refused.value.details())


def test_ports_that_are_flooded_at_once_do_not_wait_for_each_other(repository: Path) -> None:
    """Each has a thread of gRPC's, which ends calls of its own port alone."""
    with served(repository, health_port=0, max_message_bytes=2**24) as (server, stub):

        def flood(address: str) -> None:
            with frames(address) as silent:
                for _ in range(600):
                    silent.call(UNARY[-2])

        threads = [
            threading.Thread(target=flood, args=(address,))
            for address in (server.address, server.health_address) * 2
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert raw_output(stub.ModelInfer(ROW, timeout=WAIT_S)).shape == (1, 3)


def test_honest_clients_lose_nothing_among_hostile_messages(
    tmp_path: Path, repository: Path
) -> None:
    flags, client, ca = strangers.protections(tmp_path)["certificates in the rules"]
    figures, lost, _ = strangers.try_one(repository, flags, client, ca, len(kinds()), 0, 0.0)
    assert not lost
    assert figures["calls"] > 0
    assert figures["MB more"] < strangers.MOST_GROWTH_MB


def test_metadata_is_limited_for_who_does_not_read_the_settings(repository: Path) -> None:
    with served(repository) as (server, stub), frames(server.address, acknowledge=False) as rude:
        for method in (UNARY[0], UNARY[2], UNARY[5], STREAMS[0], STREAMS[1]):
            rude.call(method, *((f"x-{i}", "x" * 1000) for i in range(20)))
            assert rude.statuses(1) == ["8"], method  # RESOURCE_EXHAUSTED
        assert raw_output(stub.ModelInfer(ROW)).shape == (1, 3)


def test_one_address_cannot_take_every_stream(repository: Path) -> None:
    with served(repository, max_streams=4) as (server, stub):
        with frames(server.address, "127.0.0.2") as greedy:
            for _ in range(6):
                greedy.call(STREAMS[0])
            assert greedy.statuses(4) == ["8"] * 4  # RESOURCE_EXHAUSTED
            (answer,) = stub.ModelStreamInfer(iter([ROW]), timeout=WAIT_S)
            assert not answer.error_message
            for _ in range(40):
                greedy.call(STREAMS[1])
            greedy.statuses(24)
            reflect: Any = grpc.insecure_channel(server.address).stream_stream(STREAMS[1])
            assert list(reflect(iter([b"\x3a\x00"]), timeout=WAIT_S))  # lists the services
        (answer,) = stub.ModelStreamInfer(iter([ROW]), timeout=WAIT_S)
        assert not answer.error_message


def test_some_watches_are_kept_for_who_is_known(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.health._MOST_WATCHERS", 8)
    access = write_access(tmp_path / "access.toml", tokens={"inference": ["reader"]})
    with (
        served(repository, access=access) as (server, _),
        frames(server.address) as one,
        frames(server.address, "127.0.0.2") as two,
        grpc.insecure_channel(server.address) as channel,
    ):
        for connection, refused in ((one, 5), (two, 7)):  # 4 of 9 are an address's share, 6 are all
            for _ in range(9):
                connection.send(connection.call(UNARY[-1]), b"", compressed=False)
            assert connection.statuses(refused) == ["8"] * refused
        watch: Any = channel.unary_stream(UNARY[-1])
        known = watch(b"", metadata=bearer("reader"), timeout=WAIT_S)
        assert health_pb2.HealthCheckResponse.FromString(next(known)).status == 1
        known.cancel()


def test_places_are_shared_out_by_address_and_some_are_kept_for_who_is_known() -> None:
    places = Places(8, share=0.5, reserve=0.25)
    assert [places.take("one") for _ in range(5)] == [True] * 4 + [False]
    assert [places.take("two") for _ in range(3)] == [True, True, False]
    assert not places.take("three")
    assert [places.take("one", known=True) for _ in range(3)] == [True, True, False]
    places.give_back("one")
    assert places.take("two", known=True)
    assert not places.take("two", known=True)


def test_the_call_that_was_silent_longest_makes_room() -> None:
    ended: list[tuple[str, bool]] = []

    now = 0.0
    room = Room(2, patience_s=5.0, clock=lambda: now)
    first, second, third, fourth = (
        Waiting(name, "ipv4:192.0.2.1:1", ended) for name in ("first", "second", "third", "fourth")
    )
    assert room.enter(first)
    assert room.enter(second)
    assert room.hear(first)
    assert room.enter(third)
    assert ended == [("second", False)]
    assert not room.hear(second)
    assert room.hear(third)
    assert not room.enter(fourth)  # both others are heard, and work
    room.leave(third)
    assert room.enter(fourth)
    now = 4.9
    room.end_late()
    assert len(ended) == 1
    now = 5.0
    room.end_late()
    assert ended[1:] == [("fourth", True)]
    assert len(room) == 1
    fifth = Waiting("fifth", "ipv4:192.0.2.1:1", ended)
    assert room.enter(fifth)
    room.close()  # the server stops
    now = 6.0
    room.end_late()
    assert ended[2:] == [("fifth", True)]


def test_of_calls_without_a_message_those_of_the_busiest_leave() -> None:
    """A call that is slow keeps its place while others of one connection, or address, pour in."""
    ended: list[tuple[str, bool]] = []
    room = Room(8, patience_s=5.0)
    honest = Waiting("honest", "ipv4:192.0.2.1:1", ended)
    assert room.enter(honest)
    for i in range(50):
        assert room.enter(Waiting("flood", "ipv4:192.0.2.1:2", ended))
        assert room.enter(Waiting("spread", f"ipv4:192.0.2.2:{i}", ended))
    assert len(ended) == 93
    assert ("honest", False) not in ended
    assert room.hear(honest)


def test_whoever_comes_takes_the_place_of_its_own_call_first() -> None:
    ended: list[tuple[str, bool]] = []
    room = Room(32, patience_s=5.0, most_silent=2)
    assert room.enter(Waiting("flood", "ipv4:192.0.2.1:1", ended))
    honest = Waiting("honest", "ipv4:192.0.2.2:1", ended)
    assert room.enter(honest)
    for i in range(50):
        assert room.enter(Waiting("flood", "ipv4:192.0.2.1:1", ended))
        assert room.enter(Waiting("spread", f"ipv4:192.0.2.1:{i}", ended))
    assert ("honest", False) not in ended
    assert room.hear(honest)


class Waiting:
    def __init__(self, name: str, connection: str, ended: list[tuple[str, bool]]) -> None:
        self.name = name
        self.connection = connection
        self.ended = ended

    def give_up(self, *, late: bool) -> None:
        self.ended.append((self.name, late))


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("ipv4:192.0.2.1:40000", "192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:40000", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:192.0.2.1]:40000", "192.0.2.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:40000", "fe80::/64"),
        ("unix:", "unix:"),
    ],
)
def test_a_peer_is_an_address_or_a_network_of_ipv6(name: str, peer: str) -> None:
    assert peer_of(name) == peer


_FLOOD = """
import socket, sys, time
host, port, source, count, first = sys.argv[1:]
taken = []
for _ in range(int(count)):
    try:
        taken.append(socket.create_connection((host, int(port)), source_address=(source, 0)))
        taken[-1].sendall(bytes.fromhex(first))
    except OSError:
        pass
print("taken", flush=True)
sys.stdin.read()
"""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")


@contextmanager
def flooding(address: str, source: str, count: int, first: bytes) -> Iterator[None]:
    """Hold many connections open from a process of its own, whose files are its own."""
    host, _, port = address.rpartition(":")
    arguments = [host, port, source, str(count), first.hex()]
    with subprocess.Popen(
        [sys.executable, "-c", _FLOOD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        try:
            yield
        finally:
            process.kill()


def is_answered(address: str, method: str, message: bytes) -> bool:
    """Whether a client that has just come is answered."""
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100))
    with grpc.insecure_channel(address, options=options) as channel:
        call: Any = channel.unary_unary(method)
        return bool(call(message, wait_for_ready=True, timeout=WAIT_S))


@pytest.mark.parametrize(
    ("source", "first"),
    [("127.0.0.1", b""), ("127.0.0.2", _PREFACE)],
    ids=["that say nothing, from where others come", "that ask nothing, from elsewhere"],
)
def test_connections_keep_nobody_out(repository: Path, source: str, first: bytes) -> None:
    with (
        served(repository, max_connections=64, health_port=0) as (server, stub),
        flooding(server.address, source, 200, first),
        flooding(server.health_address, source, 200, first),
    ):
        for _ in range(3):
            assert is_answered(server.address, UNARY[2], ROW.SerializeToString())
            assert is_answered(server.health_address, UNARY[5], b"")
        assert raw_output(stub.ModelInfer(ROW, wait_for_ready=True, timeout=WAIT_S)).shape == (1, 3)


def test_connections_are_seen_where_few_files_may_be_open(repository: Path) -> None:
    """To look at them takes no file for each."""
    few = ("prlimit", "--nofile=256:256")
    with (
        serving("--model-repository", repository, prefix=few) as process,
        flooding(process.address, "127.0.0.2", 600, _PREFACE),
    ):
        for _ in range(3):
            assert is_answered(process.address, UNARY[2], ROW.SerializeToString())
        metrics = process.events[-1]["metrics"]
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=WAIT_S) as page:
            assert b"kanserve_ready" in page.read()


def test_a_call_without_a_message_holds_no_stop_up(repository: Path) -> None:
    hold = threading.Event()

    def silent() -> Iterator[bytes]:
        hold.wait(WAIT_S)
        yield from ()

    with (
        served(repository, receive_timeout_s=WAIT_S) as (server, _),
        grpc.insecure_channel(server.address) as channel,
    ):
        call: Any = channel.stream_unary(UNARY[2])
        future = call.future(silent())
        await_true(lambda: server.rooms["requests"].silent == 1)
        server.stop(WAIT_S, now=lambda: False)
        error = future.exception(WAIT_S)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "stopping" in error.details()  # it was ended, and not by the end of its time
        hold.set()
