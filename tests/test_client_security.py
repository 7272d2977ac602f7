"""TLS and tokens against a server that insists on them."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
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
from tests.clients import both_ways, told_why
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

    @property
    def stranger(self) -> Path:
        return self.folder / "stranger.pem"

    @property
    def stranger_key(self) -> Path:
        return self.folder / "stranger.key"


@dataclass(frozen=True)
class World:
    """Who vouches for whom."""

    files: Files
    server: grpc.ServerCredentials
    strict: grpc.ServerCredentials
    elsewhere: grpc.ServerCredentials
    expired: grpc.ServerCredentials


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    files = Files(tmp_path_factory.mktemp("tls"))
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(str(files.ca))
    other.cert_pem.write_to_path(str(files.other_ca))
    client = ca.issue_cert("client@kan.example")
    client.cert_chain_pems[0].write_to_path(str(files.cert))
    client.private_key_pem.write_to_path(str(files.key))

    stranger = other.issue_cert("stranger@kan.example")
    stranger.cert_chain_pems[0].write_to_path(str(files.stranger))
    stranger.private_key_pem.write_to_path(str(files.stranger_key))

    def pair(*names: str, end: datetime | None = None) -> list[tuple[bytes, bytes]]:
        issued = ca.issue_cert(*names, not_before=datetime(2001, 1, 1), not_after=end)
        return [(issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())]

    here, there = pair("127.0.0.1", "localhost"), pair("kan.example")
    return World(
        files,
        grpc.ssl_server_credentials(here),
        grpc.ssl_server_credentials(here, ca.cert_pem.bytes(), require_client_auth=True),
        grpc.ssl_server_credentials(there),
        grpc.ssl_server_credentials(pair("127.0.0.1", "localhost", end=datetime(2001, 2, 3))),
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
        f"127.0.0.1:{port}: the server does not speak TLS; leave out --tls and the certificates "
        "(tls=None), or give the address of one that does"
    )


# Of `localhost` gRPC tries [::1], too, and reports the connection that is refused there.
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_why_tls_fails_is_told_with_the_certificate_and_what_to_do(world: World, host: str) -> None:
    files = world.files
    by_the_same = "signed by 'trustme v"
    with answering(Bare(), world.server) as port:
        address = f"{host}:{port}"
        for tls, authority in ((Tls(files.other_ca), str(files.other_ca)), (Tls(), "a public")):
            told = refused_by(address, tls)
            assert f"in time: {address}: TLS: expected the server's certificate to be sig" in told
            assert authority in told
            assert f"found one for '127.0.0.1', 'localhost' {by_the_same}" in told
            assert "(--ca FILE, Tls(ca=...))" in told
        told = refused_by(address, None)
        assert f"{address}: the server speaks TLS, the client does not; give the cert" in told
        assert "(--ca FILE, tls=Tls(ca=...))" in told
    with answering(Bare(), world.elsewhere) as port:
        told = refused_by(f"{host}:{port}", Tls(files.ca))
        assert f"certificate to be for '{host}', found one for 'kan.example'; give" in told
        assert "(--server-name NAME, Tls(server_name=...))" in told
        told = refused_by(f"{host}:{port}", Tls(files.ca, server_name="other.example"))
        assert "certificate to be for 'other.example', found one for 'kan.example'" in told
    with answering(Bare(), world.expired) as port:
        told = refused_by(f"{host}:{port}", Tls(files.ca))
        assert "valid now, found one for '127.0.0.1', 'localhost', valid from Jan  1" in told
        assert "to Feb  3 00:00:00 2001 GMT (certificate has expired); have it renewed" in told
    with answering(Bare(), world.strict) as port:
        told = refused_by(f"{host}:{port}", Tls(files.ca))
        assert "the server expects a certificate of the client: none was given" in told
        assert "(--cert FILE --key FILE, Tls(certificate=..., key=...))" in told
        told = refused_by(f"{host}:{port}", Tls(files.ca, files.stranger, files.stranger_key))
        assert f"does not accept the client's certificate {files.stranger}" in told
    with answering(Bare()) as port:
        told = refused_by(f"{host}:{port}", Tls(files.ca))
        assert f"{host}:{port}: the server does not speak TLS; leave out --tls" in told


def test_of_several_servers_the_one_with_the_fault_is_named(world: World, port: int) -> None:
    with socket.socket() as taken:  # and does not listen
        taken.bind(("127.0.0.1", 0))
        away = f"127.0.0.1:{taken.getsockname()[1]}"
        told = refused_by(f"{away},127.0.0.1:{port}", Tls(world.files.other_ca))
    assert f"in time: 127.0.0.1:{port}: TLS: expected" in told


def test_a_port_of_another_protocol_over_tls_is_told(world: World) -> None:
    issued = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    issued.issue_cert("127.0.0.1").configure_cert(context)
    roots = world.files.folder / "web.pem"
    issued.cert_pem.write_to_path(str(roots))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            while True:
                try:
                    context.wrap_socket(listening.accept()[0], server_side=True).close()
                except ssl.SSLError:
                    pass
                except OSError:
                    return

        thread = threading.Thread(target=greet)
        thread.start()
        told = refused_by(f"127.0.0.1:{listening.getsockname()[1]}", Tls(roots))
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert "speaks TLS, but does not offer HTTP/2 (ALPN h2), which gRPC needs" in told


def test_health_tells_why_tls_fails_too(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(Bare(), world.server) as port:
        command = ["health", "--address", f"localhost:{port}", "--timeout-s", str(WAIT_S)]
        assert main([*command, "--ca", str(world.files.other_ca)]) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"error: localhost:{port}: TLS: expected the server's certificate")
        assert main(command) == 1
        assert "the server speaks TLS, the client does not" in capsys.readouterr().err


@pytest.mark.parametrize("over_tls", [True, False])
def test_a_missing_token_is_told_from_a_wrong_one(world: World, over_tls: bool) -> None:
    tls = Tls(world.files.ca) if over_tls else None
    with answering(Bare(tokens={"first"}), world.server if over_tls else None) as port:
        for token, told in (
            (None, "no token was sent; give one (token, token_file, --token-file)"),
            ("second", "the server does not know the token that was sent; give a token that the"),
        ):
            for found in both_ways(f"127.0.0.1:{port}", "metadata", "pair", tls=tls, token=token):
                assert isinstance(found, Refused)
                assert told in str(found)
                assert "second" not in str(found)


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
        told = "error: localhost:{}: model 'pair': the token is not one of ours; the server does"
        assert capsys.readouterr().err.startswith(told.format(port))
        for missing in (flags[:2], ["--tls"], []):  # no certificate, no CA, no TLS
            assert main([*command, *missing, "--timeout-s", str(SHORT_S)]) == 1
            assert "error: no server has answered in time" in capsys.readouterr().err
