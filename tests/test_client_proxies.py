"""Where a token goes without TLS, seen by a proxy that the environment names and that records."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from protos.inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from serving.client import AsyncKanClient, KanClient, Tls, WrongSetting
from serving.client.__main__ import main
from tests.bare import Bare, answering
from tests.ports import free_port
from tests.servers import WAIT_S

TOKEN = "s3cret-token"
# Those that gRPC reads, and how others write them.
VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
READ_BY_GRPC = VARIABLES[:3]
REFUSED = r"expected host:port|a token is sent over TLS, or to this machine"


@dataclass
class Proxy:
    """Tunnels what it is asked to, as a proxy does, and records every byte from the client."""

    port: int
    received: bytearray = field(default_factory=bytearray)

    def tunnel(self, client: socket.socket) -> None:
        with client:
            request = b""
            while b"\r\n\r\n" not in request:
                content = client.recv(4096)
                if not content:
                    return
                self.received += content
                request += content
            host, _, port = request.split()[1].decode().rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port))) as server:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=self.copy, args=(server, client, False))
                back.start()
                self.copy(client, server, True)
                back.join()

    def copy(self, source: socket.socket, sink: socket.socket, record: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                if record:
                    self.received += content
                sink.sendall(content)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        found = Proxy(listening.getsockname()[1])

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    threading.Thread(target=one, args=(client,), daemon=True).start()

        def one(client: socket.socket) -> None:
            with contextlib.suppress(OSError):
                found.tunnel(client)

        thread = threading.Thread(target=accept)
        thread.start()
        yield found
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    return file


def name_proxy(monkeypatch: pytest.MonkeyPatch, proxy: Proxy, variable: str) -> None:
    for other in (*VARIABLES, "no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    if variable == "GRPC_ADDRESS_HTTP_PROXY":  # which does not heed the option for the others
        monkeypatch.setenv(variable, f"127.0.0.1:{proxy.port}")
        monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "127.0.0.0/8,::1/128")
    else:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")


def ask_sync(address: str, **keywords: Any) -> None:
    with KanClient(address, timeout_s=WAIT_S, **keywords) as client:
        client.metadata("pair")


def ask_aio(address: str, **keywords: Any) -> None:
    async def ask() -> None:
        async with AsyncKanClient(address, timeout_s=WAIT_S, **keywords) as client:
            await client.metadata("pair")

    asyncio.run(ask())


@pytest.mark.parametrize("variable", [*VARIABLES, "GRPC_ADDRESS_HTTP_PROXY"])
def test_a_token_in_clear_passes_no_proxy(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, token_file: Path, variable: str
) -> None:
    name_proxy(monkeypatch, proxy, variable)
    servicer = Bare(tokens={TOKEN})
    with answering(servicer) as port:
        for host in ("127.0.0.1:{}", "localhost:{}", "ipv4:127.0.0.1:{}", "dns:///localhost:{}",
                     "127.0.0.1:{0},127.0.0.1:{0}"):  # fmt: skip
            ask_sync(host.format(port), token=TOKEN)
            ask_aio(host.format(port), token_file=token_file)
        flags = ["--address", f"localhost:{port}", "--token-file", str(token_file)]
        load = ["--model", "pair", "--rate", "100", "--seconds", "0.2"]
        assert main(["bench", *flags, *load]) == 0
        main(["health", *flags])  # which this server does not know
        main(["models", *flags])
    assert servicer.seen
    assert bytes(proxy.received) == b""


@pytest.mark.parametrize("variable", ["http_proxy", "GRPC_ADDRESS_HTTP_PROXY"])
def test_a_token_to_a_unix_socket_passes_no_proxy(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    name_proxy(monkeypatch, proxy, variable)
    servicer = Bare(tokens={TOKEN})
    with unix_server(servicer, f"{tmp_path}/kan.sock") as (path, abstract):
        ask_sync(f"unix:{path}", token=TOKEN)
        ask_aio(f"unix:{path}", token=TOKEN)
        ask_sync(f"unix-abstract:{abstract}", token=TOKEN)
        ask_aio(f"unix-abstract:{abstract}", token=TOKEN)
    assert bytes(proxy.received) == b""


@contextlib.contextmanager
def unix_server(servicer: Bare, path: str) -> Iterator[tuple[str, str]]:
    abstract = path.strip("/").replace("/", "-")
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        add_GRPCInferenceServiceServicer_to_server(servicer, server)
        server.add_insecure_port(f"unix:{path}")
        server.add_insecure_port(f"unix-abstract:{abstract}")
        server.start()
        try:
            yield path, abstract
        finally:
            server.stop(None).wait()


@pytest.mark.parametrize("ask", [ask_sync, ask_aio])
@pytest.mark.parametrize("variable", [*READ_BY_GRPC, "GRPC_ADDRESS_HTTP_PROXY"])
def test_without_a_token_the_same_calls_pass_it_so_the_proxy_is_one(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, variable: str, ask: Callable[..., None]
) -> None:
    name_proxy(monkeypatch, proxy, variable)
    with answering(Bare()) as port:
        ask(f"127.0.0.1:{port}")
    assert proxy.received.startswith(b"CONNECT 127.0.0.1:")


@pytest.mark.parametrize("ask", [ask_sync, ask_aio])
def test_over_tls_a_proxy_is_used_and_sees_no_token(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ask: Callable[..., None]
) -> None:
    name_proxy(monkeypatch, proxy, "https_proxy")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = ca.issue_cert("127.0.0.1")
    pair = [(issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())]
    servicer = Bare(tokens={TOKEN})
    with answering(servicer, grpc.ssl_server_credentials(pair)) as port:
        ask(f"127.0.0.1:{port}", tls=Tls(ca=tmp_path / "ca.pem"), token=TOKEN)
    assert {seen["authorization"] for seen in servicer.seen} == {f"Bearer {TOKEN}"}
    connect, _, tunnelled = bytes(proxy.received).partition(b"\r\n\r\n")
    assert connect.startswith(b"CONNECT 127.0.0.1:")
    assert tunnelled.startswith(b"\x16\x03")  # a handshake of TLS, and nothing before it
    assert TOKEN.encode() not in proxy.received
    assert b"authorization" not in proxy.received


@pytest.mark.parametrize(
    "address",
    [
        "xds:///localhost:{}",
        "xds:///kan",
        "dns://127.0.0.1:{}/localhost:1",
        "dns://10.0.0.9/localhost:1",
        "dns:///kan.example:{}",
        "dns:///localhost.:{}",
        "dns:///%6cocalhost:{}",
        "ipv4://10.0.0.9/127.0.0.1:{}",
        "ipv4:127.0.0.1:{},192.0.2.1:{}",
        "ipv4:127.0.0.1:1%2C192.0.2.1:{}",
        "ipv6:[::1%25eth0]:{}",
        "[::1%eth0]:{}",
        "[::ffff:192.0.2.1]:{}",
        "0.0.0.0:{}",
        "127.1:{}",
        "2130706433:{}",
        "localhost.kan.example:{}",
        "127.0.0.1.kan.example:{}",
        "localhost@192.0.2.1:{}",
        "unix:{} x",
        "unix:{}%",
        "unix-abstract:{}#x",
        "DNS:///localhost:{}",
        "passthrough:///127.0.0.1:{}",
        "google-c2p:///kan",
        "vsock:3:{}",
        "http://127.0.0.1:{}",
    ],
)
def test_a_token_in_clear_goes_to_no_address_that_others_decide(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name_proxy(monkeypatch, proxy, "http_proxy")
    target = address.format(proxy.port, proxy.port)
    for ask in (ask_sync, ask_aio):
        with pytest.raises(WrongSetting, match=REFUSED) as error:
            ask(target, token=TOKEN)
        assert TOKEN not in str(error.value)
    assert bytes(proxy.received) == b""


def test_localhost_is_resolved_here_and_leads_to_this_machine_alone(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ["192.0.2.1"]

    def look_up(host: str, *_: object, **__: object) -> list[Any]:
        return [(None, None, None, "", (address, 0)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(WrongSetting, match="a token is sent over TLS"):
        KanClient("localhost:1", token=TOKEN)
    found.append("::1")
    with KanClient("localhost:1", token=TOKEN) as client:
        assert client._connection.target == "ipv6:[::1]:1"


IPV4_AND_IPV6 = [
    (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::1", 0, 0, 0)),
    (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0)),
]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_token_reaches_the_server_that_listens_at_one_address_of_localhost(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    if host == "::1" and not has_ipv6_loopback():
        pytest.skip("this machine has no ::1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: IPV4_AND_IPV6)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        server.bind((host, 0))
        server.listen()
        port = server.getsockname()[1]
        shown = f"ipv6:[::1]:{port}" if ":" in host else f"ipv4:127.0.0.1:{port}"
        for address in (f"localhost:{port}", f"LOCALHOST:{port}", f"dns:///localhost:{port}"):
            with KanClient(address, token=TOKEN) as client:
                assert client._connection.target == shown
        several = [f"localhost:{port}", "localhost:1"]
        with KanClient(several, token=TOKEN) as client:
            assert client._connection.target.startswith(shown)


def test_localhost_is_of_the_kind_of_the_literal_addresses_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: IPV4_AND_IPV6)
    for literal, target in (
        ("[::1]:2", "ipv6:[::1]:1,[::1]:2"),
        ("127.0.0.2:2", "ipv4:127.0.0.1:1,127.0.0.2:2"),
    ):
        with KanClient(["localhost:1", literal], token=TOKEN) as client:
            assert client._connection.target == target
    with pytest.raises(WrongSetting, match="all of IPv4 or all of IPv6, found both"):
        KanClient(["127.0.0.1:1", "[::1]:2"], token=TOKEN)


def test_localhost_without_any_server_is_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: IPV4_AND_IPV6)
    port = free_port()
    with KanClient(f"localhost:{port}", token=TOKEN) as client:
        assert client._connection.target == f"ipv4:127.0.0.1:{port}"


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
