"""TLS and tokens against a server that insists on them."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from serving.client import (
    AsyncKanClient,
    ClientError,
    KanClient,
    Refused,
    TimedOut,
    Tls,
    WrongSetting,
)
from serving.client.__main__ import main
from tests.bare import A, Bare, N, answering
from tests.clients import told_why
from tests.servers import WAIT_S

__all__ = ["told_why"]

INPUTS: dict[str, NDArray[Any]] = {"a": A, "n": N}
SHORT_S = 0.3  # for a server that is never believed

pytestmark = pytest.mark.usefixtures("told_why")


@dataclass(frozen=True)
class Files:
    """Certificates in files, as operators hand them out."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def other_ca(self) -> Path:
        return self.folder / "other.pem"

    @property
    def cert(self) -> Path:
        return self.folder / "client.pem"

    @property
    def key(self) -> Path:
        return self.folder / "client.key"


@dataclass(frozen=True)
class World:
    """Who vouches for whom."""

    files: Files
    server: grpc.ServerCredentials
    strict: grpc.ServerCredentials
    elsewhere: grpc.ServerCredentials


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    files = Files(tmp_path_factory.mktemp("tls"))
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(str(files.ca))
    other.cert_pem.write_to_path(str(files.other_ca))
    client = ca.issue_cert("client@kan.example")
    client.cert_chain_pems[0].write_to_path(str(files.cert))
    client.private_key_pem.write_to_path(str(files.key))

    def pair(*names: str) -> list[tuple[bytes, bytes]]:
        issued = ca.issue_cert(*names)
        return [(issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())]

    here, there = pair("127.0.0.1", "localhost"), pair("kan.example")
    return World(
        files,
        grpc.ssl_server_credentials(here),
        grpc.ssl_server_credentials(here, ca.cert_pem.bytes(), require_client_auth=True),
        grpc.ssl_server_credentials(there),
    )


@pytest.fixture
def port(world: World) -> Iterator[int]:
    with answering(Bare(), world.server) as port:
        yield port


def ask(addresses: str | list[str], tls: Tls | None, **keywords: Any) -> None:
    """Ask in both ways."""

    async def answer() -> NDArray[Any]:
        async with AsyncKanClient(addresses, tls=tls, **keywords) as client:
            return await client.infer("pair", INPUTS, output="total")

    with KanClient(addresses, tls=tls, **keywords) as client:
        found = client.infer("pair", INPUTS, output="total")
    for each in (found, asyncio.run(answer())):
        np.testing.assert_array_equal(each, A + N[:, None])


def refused_by(addresses: str, tls: Tls | None) -> str:
    with pytest.raises(TimedOut) as told:
        ask(addresses, tls, timeout_s=SHORT_S)
    return str(told.value)


def test_a_server_is_believed_whom_the_ca_vouches_for(world: World, port: int) -> None:
    tls = Tls(ca=world.files.ca)
    ask(f"127.0.0.1:{port}", tls)
    ask(f"localhost:{port}", tls)
    ask([f"127.0.0.1:{port}", f"127.0.0.1:{port}"], tls)  # one name for all of them


def test_no_other_server_is_believed(world: World, port: int) -> None:
    assert "certificate" in refused_by(f"127.0.0.1:{port}", Tls(ca=world.files.other_ca)).lower()
    refused_by(f"127.0.0.1:{port}", Tls())  # public ones alone
    refused_by(f"127.0.0.1:{port}", None)


def test_a_server_without_tls_is_told_from_one_that_is_away() -> None:
    with answering(Bare()) as port:
        told = refused_by(f"127.0.0.1:{port}", Tls())
    assert told.endswith(
        f"127.0.0.1:{port}: the server does not speak TLS; leave out --tls and the certificates, "
        "or give the address of one that does"
    )


def test_the_certificates_name_is_the_addresss_or_the_one_that_is_given(world: World) -> None:
    with answering(Bare(), world.elsewhere) as port:
        address = f"127.0.0.1:{port}"
        ask(address, Tls(ca=world.files.ca, server_name="kan.example"))
        refused_by(address, Tls(ca=world.files.ca))
        refused_by(address, Tls(ca=world.files.ca, server_name="other.example"))
        several = [address, f"localhost:{port}"]
        ask(several, Tls(ca=world.files.ca, server_name="kan.example"))
        with pytest.raises(WrongSetting, match="expected the name that the certificates"):
            ask(several, Tls(ca=world.files.ca))


def test_a_server_can_want_the_clients_certificate(world: World) -> None:
    files = world.files
    with answering(Bare(), world.strict) as port:
        ask(f"127.0.0.1:{port}", Tls(files.ca, files.cert, files.key))
        refused_by(f"127.0.0.1:{port}", Tls(files.ca))


@pytest.mark.parametrize("over_tls", [True, False])
def test_a_token_is_read_anew_at_every_call(world: World, over_tls: bool, tmp_path: Path) -> None:
    servicer, file = Bare(tokens={"first", "second"}), tmp_path / "token"
    tls = Tls(world.files.ca) if over_tls else None
    with answering(servicer, world.server if over_tls else None) as port:
        file.write_text("first\n")
        with KanClient(f"127.0.0.1:{port}", tls=tls, token_file=file) as client:
            client.metadata("pair")
            assert {seen["authorization"] for seen in servicer.seen} == {"Bearer first"}
            file.write_text("second\n")
            client.infer_all("pair", INPUTS)
            assert servicer.seen[-1]["authorization"] == "Bearer second"
            file.write_text("third")
            with pytest.raises(Refused, match="give a token that the server takes") as refused:
                client.infer_all("pair", INPUTS)
            assert refused.value.code == "UNAUTHENTICATED"
            assert "third" not in str(refused.value)
            file.unlink()
            with pytest.raises(WrongSetting, match="cannot be read"):
                client.infer_all("pair", INPUTS)


class Guarded(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Tells its health to who has a token."""

    def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[health_pb2.HealthCheckResponse]:
        if ("authorization", "Bearer first") not in list(context.invocation_metadata()):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not one of ours")
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


def test_a_server_whose_health_wants_a_token_is_found_healthy(world: World) -> None:
    servicer = Bare(tokens={"first"})
    with answering(servicer, world.server, Guarded()) as port:
        ask(f"127.0.0.1:{port}", Tls(world.files.ca), token="first")
    assert {str(seen["authorization"]) for seen in servicer.seen} == {"Bearer first"}


def test_files_that_are_no_certificates_are_told_before_anybody_is_asked(
    world: World, tmp_path: Path
) -> None:
    files, other = world.files, tmp_path / "other.pem"
    other.write_text("-----BEGIN CERTIFICATE-----\n")
    for tls, told in (
        (Tls(tmp_path / "none"), "none: cannot be read: No such file"),
        (Tls(other), "other.pem: expected certificates as PEM"),
        (Tls(files.key), "client.key: expected certificates as PEM"),
        (Tls(files.ca, files.cert), "found only the certificate; give the key too"),
        (Tls(files.ca, key=files.key), "found only the key; give the certificate too"),
        (Tls(files.ca, files.ca, files.key), "expected a certificate and its key as PEM"),
        (Tls(files.ca, files.cert, other), "expected a certificate and its key as PEM"),
    ):
        with pytest.raises(ClientError) as error:
            KanClient("127.0.0.1:1", tls=tls)
        assert isinstance(error.value, WrongSetting)
        assert told in str(error.value)


def test_the_command_takes_the_same_files(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, x, token = world.files, tmp_path / "x.npz", tmp_path / "token"
    np.savez(x, **INPUTS)  # type: ignore[arg-type]
    token.write_text("first\n")
    servicer = Bare(tokens={"first"})
    with answering(servicer, world.strict) as port:
        command = ["infer", "--model", "pair", "--input", str(x), "--output-tensor", "twice"]
        command += ["--address", f"localhost:{port}", "--timeout-s", str(WAIT_S)]
        flags = ["--ca", str(files.ca), "--cert", str(files.cert), "--key", str(files.key)]
        flags += ["--server-name", "127.0.0.1", "--token-file", str(token)]
        assert main([*command, *flags]) == 0
        assert capsys.readouterr().out.startswith("3,-4\n")
        token.write_text("second\n")
        assert main([*command, *flags]) == 1
        told = "error: localhost:{}: model 'pair': the token is not one of ours; give a token"
        assert capsys.readouterr().err.startswith(told.format(port))
        for missing in (flags[:2], ["--tls"], []):  # no certificate, no CA, no TLS
            assert main([*command, *missing, "--timeout-s", str(SHORT_S)]) == 1
            assert "error: no server has answered in time" in capsys.readouterr().err
