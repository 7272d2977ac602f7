"""TLS as clients see it: whom the server lets in, and certificates that change."""

import json
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client import KanClient, Refused, Tls
from serving.tls import Renewal
from tests.conftest import STATE_DICTS, run_module
from tests.processes import serving
from tests.security import Authority, write_access
from tests.servers import WAIT_S, await_true, served
from tests.wire import raw_output, raw_request

UNIFORM = STATE_DICTS[0]
ROW = raw_request(UNIFORM.x[:1])
REFUSED_S = 5.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "ca")


def answers(channel: grpc.Channel, timeout: float = WAIT_S) -> bool:
    """Whether there is an answer; if not, there is no connection."""
    with channel:
        call: Any = GRPCInferenceServiceStub(channel).ModelInfer.future(ROW, timeout=timeout)
        if call.exception() is not None:
            assert call.code() is grpc.StatusCode.UNAVAILABLE
            return False
        response = call.result()
    np.testing.assert_allclose(raw_output(response), UNIFORM.y64[:1], rtol=1e-5, atol=1e-5)
    return True


def test_clients_that_trust_the_server_are_answered(repository: Path, authority: Authority) -> None:
    with served(repository, **authority.settings()) as (server, _):
        assert answers(authority.channel(server.address))


def test_plaintext_to_a_port_with_tls_fails_and_hurts_nobody(
    repository: Path, authority: Authority
) -> None:
    with served(repository, **authority.settings()) as (server, _):
        assert not answers(grpc.insecure_channel(server.address))
        assert answers(authority.channel(server.address))


def test_a_client_that_trusts_somebody_else_is_not_answered(
    repository: Path, authority: Authority, tmp_path: Path
) -> None:
    other = Authority.make(tmp_path / "other")
    with served(repository, **authority.settings()) as (server, _):
        assert not answers(other.channel(server.address))


def test_mutual_tls_wants_a_certificate_of_its_own_authority(
    repository: Path, authority: Authority, tmp_path: Path
) -> None:
    other = Authority.make(tmp_path / "other")
    with served(repository, **authority.settings(mutual=True)) as (server, _):
        assert answers(authority.channel(server.address, "client.example"))
        assert not answers(authority.channel(server.address))
        leaf = other.ca.issue_cert("client.example")
        credentials = grpc.ssl_channel_credentials(
            authority.roots.read_bytes(),
            leaf.private_key_pem.bytes(),
            leaf.cert_chain_pems[0].bytes(),
        )
        assert not answers(grpc.secure_channel(server.address, credentials))


def test_certificates_are_renewed_without_a_restart(
    repository: Path, authority: Authority, tmp_path: Path
) -> None:
    other = Authority.make(tmp_path / "other")
    with (
        served(repository, **authority.settings()) as (server, _),
        authority.channel(server.address) as kept,
    ):
        stub = GRPCInferenceServiceStub(kept)
        stub.ModelInfer(ROW, timeout=WAIT_S)
        authority.cert.write_bytes(other.cert.read_bytes())
        # The key is still the old one: both do not fit, so what was there goes on.
        assert answers(authority.channel(server.address))
        authority.key.write_bytes(other.key.read_bytes())
        await_true(lambda: answers(other.channel(server.address), REFUSED_S))
        stub.ModelInfer(ROW, timeout=WAIT_S)  # connections outlive the certificate


def test_a_configuration_is_given_to_grpc_once_and_never_while_others_use_the_one_before() -> None:
    events: list[str] = []
    present: Any = "first"

    def sleep(_: float) -> None:
        events.append("wait")

    renewal: Any = Renewal(lambda: present, sleep=sleep)
    assert (renewal.current, renewal(), renewal()) == ("first", None, None)
    assert events == []  # a handshake waits for nothing
    present = "second"
    assert renewal() == "second"
    assert events == ["wait"]  # for those that have asked before
    assert renewal() is None
    assert events == ["wait", "wait"]  # until gRPC has it
    assert renewal() is None
    assert len(events) == 2


def test_handshakes_by_the_thousand_and_renewals_leave_the_server_running(
    repository: Path, authority: Authority
) -> None:
    """With a configuration given at every handshake it crashed within 300 to 3,000 of them."""
    tls = ("--tls-cert", authority.cert, "--tls-key", authority.key)
    context = ssl.create_default_context(cafile=authority.roots)
    context.set_alpn_protocols(["h2"])

    def shake_hands(times: int) -> int:
        done = 0
        for _ in range(times):
            with suppress(OSError), socket.create_connection((host, int(port)), WAIT_S) as plain:
                context.wrap_socket(plain, server_hostname="localhost").close()
                done += 1
        return done

    with (
        serving("--model-repository", repository, *tls) as process,
        ThreadPoolExecutor(8) as pool,
    ):
        host, _, port = process.address.rpartition(":")
        for _ in range(2):
            asked = [pool.submit(shake_hands, 250) for _ in range(8)]
            authority.renew()
            assert sum(future.result() for future in asked) > 1_000
        assert process.popen.poll() is None
        assert answers(authority.channel(process.address))


def test_health_has_a_port_of_its_own_without_tls(repository: Path, authority: Authority) -> None:
    with (
        served(repository, health_port=0, **authority.settings(mutual=True)) as (server, _),
        grpc.insecure_channel(server.health_address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        found = stub.Check(request, timeout=WAIT_S)
        assert found.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            GRPCInferenceServiceStub(channel).ModelInfer(ROW, timeout=WAIT_S)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        changes = stub.Watch(request, timeout=WAIT_S)
        next(changes)
        server.drain()
        assert next(changes).status == health_pb2.HealthCheckResponse.NOT_SERVING
        server.stop(0, lambda: False)  # on this port the process answers to its end
        live = stub.Check(health_pb2.HealthCheckRequest(service="live"), timeout=WAIT_S)
        assert live.status == health_pb2.HealthCheckResponse.SERVING


def test_workers_share_certificates_and_the_port_for_health(
    repository: Path, authority: Authority
) -> None:
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in authority.settings().items()]
    with serving(
        "--model-repository", repository, "--workers", "2", "--health-port", "0", *flags
    ) as process:
        assert answers(authority.channel(process.address))
        with grpc.insecure_channel(process.events[-1]["health"]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            found = stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            assert found.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server.pem": None}, "--tls-cert FOLDER/server.pem: cannot be read"),
        ({"server.pem": b"none"}, "expected a PEM certificate and its own key"),
        ({"server.key": "other"}, "expected a PEM certificate and its own key"),
        ({"ca.pem": b"none"}, "--tls-client-ca FOLDER/ca.pem: expected PEM certificates"),
    ],
)
def test_files_that_are_of_no_use_are_refused_at_the_start(
    repository: Path,
    authority: Authority,
    tmp_path: Path,
    changes: dict[str, bytes | str | None],
    message: str,
) -> None:
    for name, content in changes.items():
        if content is None:
            (authority.folder / name).unlink()
        else:
            if content == "other":
                content = Authority.make(tmp_path / "other").key.read_bytes()
            assert isinstance(content, bytes)
            (authority.folder / name).write_bytes(content)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in authority.settings(mutual=True).items()]
    done = run_module("serving", "--model-repository", repository, "--grpc-port", "0", *flags)
    assert done.returncode == 1
    event = json.loads(done.stderr.splitlines()[-1])
    assert event["event"] == "refused_to_start"
    assert message.replace("FOLDER", str(authority.folder)) in event["reason"]
    assert "PRIVATE" not in done.stderr


def test_our_client_shows_token_and_certificate_to_our_server(
    repository: Path, authority: Authority, tmp_path: Path
) -> None:
    cert, key = authority.write_client("client.example")
    access = write_access(
        tmp_path / "access.toml",
        tokens={"inference": ["known"]},
        certificates={"admin": ["client.example"]},
    )
    tls = Tls(ca=authority.roots, certificate=cert, key=key)
    with served(repository, access=access, **authority.settings(mutual=True)) as (server, _):
        with KanClient(server.address, tls=tls, token="known") as client:
            y = client.infer(UNIFORM.name, UNIFORM.x)
        np.testing.assert_allclose(y, UNIFORM.y64, rtol=1e-5, atol=1e-5)
        with KanClient(server.address, tls=tls) as client, pytest.raises(Refused):
            client.infer(UNIFORM.name, UNIFORM.x)
    with (
        served(repository, access=access) as (server, _),
        KanClient(server.address, token="known") as client,  # in clear, to this machine alone
    ):
        y = client.infer(UNIFORM.name, UNIFORM.x)
        np.testing.assert_allclose(y, UNIFORM.y64, rtol=1e-5, atol=1e-5)
