"""The configurations of deploy/balancers, run by the programs that they are for."""

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client import KanClient, Unavailable
from tests.chaos import ways
from tests.chaos.replicas import Replica, replicas
from tests.chaos.ways import (
    BALANCERS,
    CLIENT,
    Way,
    envoy_program,
    every_way,
    nginx_command,
    rendered,
)
from tests.conftest import ROOT, STATE_DICTS
from tests.ports import free_port
from tests.servers import WAIT_S, await_true
from tests.wire import raw_output, raw_request

UNIFORM = STATE_DICTS[0]
ELSEWHERE = [f"127.0.0.1:{port}" for port in (1, 2, 3)]  # where nobody listens
behind_each_balancer = pytest.mark.parametrize(
    "way", [way for way in every_way() if way.values != (CLIENT,)]
)


def needs(program: str | None, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(program is None, reason=f"not installed: {package}")


@needs(shutil.which("nginx"), "Debian's package `nginx-light`")
def test_nginx_finds_nothing_wrong(tmp_path: Path) -> None:
    config = tmp_path / "nginx.conf"
    config.write_text(rendered("nginx.conf", ELSEWHERE, "127.0.0.1:8001"))
    done = subprocess.run([*nginx_command(config), "-t"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


@needs(shutil.which("haproxy"), "Debian's package `haproxy`")
def test_haproxy_finds_nothing_wrong(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(rendered("haproxy.cfg", ELSEWHERE, "127.0.0.1:8001"))
    done = subprocess.run(["haproxy", "-c", "-f", config], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr


@needs(envoy_program(), "`make .venv-envoy/installed`")
def test_envoy_finds_nothing_wrong() -> None:
    program = envoy_program()
    assert program is not None
    command = [program, "--mode", "validate", "-c", str(BALANCERS / "envoy.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower()


def test_haproxys_health_check_is_the_one_of_grpc() -> None:
    """Read by another implementation of HTTP/2 than wrote it."""
    config = (BALANCERS / "haproxy.cfg").read_text()
    sent = b"".join(map(bytes.fromhex, re.findall(r"tcp-check send-binary (\S+)", config)))
    server = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
    server.initiate_connection()
    events = server.receive_data(sent)
    (request,) = [event for event in events if isinstance(event, RequestReceived)]
    headers = {str(name): str(value) for name, value in request.headers}
    assert headers == {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/grpc.health.v1.Health/Check",
        ":authority": "kanserve",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    (message,) = [event for event in events if isinstance(event, DataReceived)]
    assert message.data == framed(health_pb2.HealthCheckRequest().SerializeToString())
    assert any(isinstance(event, StreamEnded) for event in events)
    (expected,) = re.findall(r"tcp-check expect min-recv 1 binary (\S+)", config)
    serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    assert bytes.fromhex(expected) == framed(serving.SerializeToString())


def framed(message: bytes) -> bytes:
    """As gRPC sends a message: not compressed, its length, itself."""
    return b"\0" + len(message).to_bytes(4, "big") + message


@pytest.fixture(scope="module")
def servers(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    """Three that stay as they are."""
    with replicas(tmp_path_factory.mktemp("logs"), [repository] * 3) as found:
        yield found


@pytest.fixture
def address(way: Way, servers: list[Replica], tmp_path: Path) -> Iterator[str]:
    """Of a balancer in front of them."""
    with way.open([server.address for server in servers], tmp_path) as (address,):
        yield address


def answered(server: Replica) -> int:
    """How many requests a server has answered."""
    with grpc.insecure_channel(server.address) as channel:
        request = pb.ModelStatisticsRequest(name=UNIFORM.name)
        found = GRPCInferenceServiceStub(channel).ModelStatistics(request, timeout=WAIT_S)
    return sum(one.inference_stats.success.count for one in found.model_stats)


@behind_each_balancer
def test_requests_of_one_connection_are_spread_over_all_servers(
    address: str, servers: list[Replica]
) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        before = [answered(server) for server in servers]

        def knows_all() -> bool:  # a balancer finds out first which servers are ready
            raw_output(stub.ModelInfer(raw_request(UNIFORM.x), timeout=WAIT_S))
            return all(answered(s) > n for s, n in zip(servers, before, strict=True))

        await_true(knows_all)
        before = [answered(server) for server in servers]
        under_way = [stub.ModelInfer.future(raw_request(UNIFORM.x)) for _ in range(150)]
        for future in under_way:
            found = raw_output(future.result(WAIT_S))
            np.testing.assert_allclose(found, UNIFORM.y64, rtol=1e-5, atol=1e-5)
    shares = [answered(server) - n for server, n in zip(servers, before, strict=True)]
    assert sum(shares) == 150
    assert min(shares) > 15


@behind_each_balancer
def test_a_stream_goes_through_one_by_one(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        sent = [raw_request(UNIFORM.x[: i % 7], id=str(i)) for i in range(100)]
        answers = list(stub.ModelStreamInfer(iter(sent), timeout=WAIT_S))
    assert [answer.infer_response.id for answer in answers] == [str(i) for i in range(100)]


@behind_each_balancer
def test_what_a_server_takes_goes_through_and_more_is_refused_in_words_of_grpc(
    address: str,
) -> None:
    """A message may have 64 MiB, as the server has it by default."""
    mib = 2**20
    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
        stub = GRPCInferenceServiceStub(channel)
        large = raw_request(UNIFORM.x, id="x" * (60 * mib))
        answer = stub.ModelInfer(large, timeout=WAIT_S)
        assert answer.id == large.id
        np.testing.assert_allclose(raw_output(answer), UNIFORM.y64, rtol=1e-5, atol=1e-5)
        for size in (64 * mib, 66 * mib):  # by the server, and by a balancer with a limit
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(raw_request(UNIFORM.x, id="x" * size), timeout=WAIT_S)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "larger than max" in str(refused.value.details())


@behind_each_balancer
def test_health_is_told_and_not_watched(address: str) -> None:
    """A watch would tell the health of one server, whatever the others are."""
    request = health_pb2.HealthCheckRequest()
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        found = stub.Check(request, timeout=WAIT_S)
        assert found.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            next(stub.Watch(request, timeout=WAIT_S))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@behind_each_balancer
def test_models_are_not_loaded_in_one_server_of_three(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        calls = [
            (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name=UNIFORM.name)),
            (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name=UNIFORM.name)),
        ]
        for method, request in calls:
            with pytest.raises(grpc.RpcError) as refused:
                method(request, timeout=WAIT_S)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Each limit of a caller, as the files have it, and a smaller one that a test goes over.
LIMITS = {
    "rate=20000r/s": "rate=1r/s",
    "burst=20000": "burst=5",
    "sc_gpc0_rate(0) ge 20000": "sc_gpc0_rate(0) ge 5",
    "max_tokens: 20000, tokens_per_fill: 20000": "max_tokens: 5, tokens_per_fill: 5",
    "fill_interval: 1s": "fill_interval: 60s",
}


@behind_each_balancer
def test_one_caller_takes_no_more_than_the_balancer_lets_it(
    way: Way, servers: list[Replica], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in BALANCERS.iterdir():
        text = file.read_text()
        limited = re.sub("|".join(map(re.escape, LIMITS)), lambda m: LIMITS[m[0]], text)
        assert limited != text
        (tmp_path / file.name).write_text(limited)
    monkeypatch.setattr(ways, "BALANCERS", tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        way.open([server.address for server in servers], folder) as (address,),
        grpc.insecure_channel(address) as channel,
    ):
        live, request = GRPCInferenceServiceStub(channel).ServerLive, pb.ServerLiveRequest()
        calls = [live.future(request, timeout=WAIT_S) for _ in range(40)]
        codes = [call.code() for call in calls]
        rejected = [c for c in calls if c.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
        for call in rejected:
            assert int(dict(call.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        check = health_pb2_grpc.HealthStub(channel).Check
        for _ in range(40):
            found = check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            assert found.status == health_pb2.HealthCheckResponse.SERVING
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert codes.count(grpc.StatusCode.OK) <= 20


def test_a_caller_may_send_more_than_a_server_answers() -> None:
    page = (ROOT / "docs" / "serving-speed.md").read_text()
    (found,) = re.findall(r"\| \*\*kanserve\*\* \| ([\d,]+) \|", page)
    answered_per_s = int(found.replace(",", ""))
    limit = r"rate=(\d+)r/s|burst=(\d+)|sc_gpc0_rate\(0\) ge (\d+)|tokens(?:_per_fill)?: (\d+)"
    for file in BALANCERS.iterdir():
        limits = [int("".join(match)) for match in re.findall(limit, file.read_text())]
        assert limits, file
        assert min(limits) > 2 * answered_per_s, file


def test_every_file_says_what_share_servers_are_to_let_a_balancer_have() -> None:
    for file in BALANCERS.iterdir():
        assert "--max-peer-share 1:" in file.read_text(), file


@behind_each_balancer
def test_without_any_server_clients_are_told_that_it_may_be_back(way: Way, tmp_path: Path) -> None:
    nobody = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    with (
        way.open(nobody, tmp_path) as addresses,
        KanClient(addresses) as client,
        pytest.raises(Unavailable) as told,
    ):
        client.infer(UNIFORM.name, UNIFORM.x, timeout_s=WAIT_S)
    assert told.value.code == "UNAVAILABLE"


@pytest.mark.parametrize("way", [way for way in every_way() if way.id in ("haproxy", "envoy")])
def test_a_server_that_drains_is_left_before_it_stops(
    way: Way, repository: Path, tmp_path: Path
) -> None:
    with (
        replicas(tmp_path, [repository] * 3, drain_s=600) as servers,
        way.open([server.address for server in servers], tmp_path) as (address,),
        grpc.insecure_channel(address) as channel,
    ):
        stub = GRPCInferenceServiceStub(channel)

        def share() -> int:
            before = answered(servers[0])
            for _ in range(30):
                stub.ModelInfer(raw_request(UNIFORM.x), timeout=WAIT_S)
            return answered(servers[0]) - before

        await_true(lambda: share() > 0)
        servers[0].send(signal.SIGTERM)
        await_true(lambda: share() == 0)
        assert servers[0].process is not None
        assert servers[0].process.poll() is None
