"""Who is answered at the metrics port, and what one client can hold of it."""

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from serving.observability import exposition
from tests.servers import WAIT_S, await_true, served

HOSTNAME = socket.gethostname()


def no_report(model: str, version: str) -> bytes:
    raise AssertionError("no report was wanted")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with exposition.served(
        CollectorRegistry(),
        no_report,
        "127.0.0.1",
        0,
        ("kan-1", "Kan.Example", "absolute.example."),
    ) as address:
        yield address


def connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), WAIT_S)


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    content = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            content += part
    return content


def status(address: str, *headers: str, path: str = "/metrics") -> int:
    with connected(address) as connection:
        head = "".join(f"{line}\r\n" for line in (f"GET {path} HTTP/1.1", *headers, ""))
        connection.sendall(head.encode())
        return int(answer(connection).split()[1])


@pytest.mark.parametrize("path", ["/", "/metrics", "/status.js", "/reports/m/1", "/nothing"])
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8002",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "kan-1.evil.example",
        f"{HOSTNAME}.evil.example",
        "evil",
        "2130706433",
        "0x7f.1",
        "127.1",
        "127.0.0.1@evil.example",
        "[evil.example]",
        "[::1",
        "",
        ":8002",
        "localhost:x",
        "localhöst",
        "localhost..",
        ".",
        ".:8002",
        "evil.example.",
        "[localhost]",
    ],
)
def test_a_name_that_may_be_a_web_pages_is_not_answered(address: str, host: str, path: str) -> None:
    assert status(address, f"Host: {host}", path=path) == 421


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8002",
        "10.1.2.3:8002",
        "[::1]:8002",
        "[fd00::1]",
        "localhost",
        "LocalHost:8002",
        "kan-1:8002",
        "kan.example",
        "KAN.EXAMPLE:80",
        HOSTNAME,
        "localhost.",
        "localhost.:8002",
        "Kan-1.",
        "kan.example.:8002",
        f"{HOSTNAME}.",
        "127.0.0.1.",
        "absolute.example",
        "absolute.example.",
    ],
)
def test_addresses_and_the_servers_own_names_are_answered(address: str, host: str) -> None:
    assert status(address, f"Host: {host}") == 200


@pytest.mark.parametrize("qualified", ["kan-9.fleet.example", "Kan-9.Fleet.Example."])
def test_this_machines_fully_qualified_name_is_answered(
    address: str, monkeypatch: pytest.MonkeyPatch, qualified: str
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: qualified)
    exposition._qualified_names.cache_clear()
    try:
        assert status(address, "Host: kan-9.fleet.example") == 200
        assert status(address, "Host: KAN-9.fleet.example.:8002") == 200
        assert status(address, "Host: fleet.example") == 421
    finally:
        exposition._qualified_names.cache_clear()


def test_no_browser_leaves_the_host_out_so_who_does_is_answered(address: str) -> None:
    assert status(address) == 200


def test_a_second_host_is_not_overlooked(address: str) -> None:
    assert status(address, "Host: localhost", "Host: evil.example") == 421
    assert status(address, "Host: evil.example", "Host: localhost") == 421


def test_who_is_not_answered_learns_the_setting_and_no_name(address: str) -> None:
    connection = http.client.HTTPConnection(address, timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers={"Host": "<b>evil</b>"})
        response = connection.getresponse()
        content = response.read().decode()
    assert (response.status, response.headers["Content-Type"].split(";")[0]) == (421, "text/plain")
    assert "--metrics-hosts" in content
    for hidden in ("<b>", "kan-1", HOSTNAME):
        assert hidden not in content


def test_the_server_takes_its_names_from_its_settings(repository: object) -> None:
    with served(repository, metrics_hosts=("kan.example",)) as (server, _):  # type: ignore[arg-type]
        assert status(server.metrics_address, "Host: kan.example:8002") == 200
        assert status(server.metrics_address, "Host: other.example:8002") == 421


def test_a_request_that_never_ends_is_ended(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "_TIME_S", 0.2)
    dripping = b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 10_000
    for silent in (True, False):
        with connected(address) as connection:
            sent = 0
            if not silent:
                with contextlib.suppress(OSError):  # until the server has had enough
                    for sent in range(len(dripping)):
                        connection.sendall(dripping[sent : sent + 1])
                        select_until_readable(connection)
            assert answer(connection) in (b"", b"HTTP/1.0 408 Request Timeout\r\n\r\n")
        assert sent < len(dripping) - 1


def select_until_readable(connection: socket.socket) -> None:
    """Let a moment pass between bytes; raise once the server has ended the connection."""
    connection.settimeout(0.01)
    try:
        if connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError
        raise ConnectionResetError
    except TimeoutError:
        pass
    finally:
        connection.settimeout(WAIT_S)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
        b"\0" * 70_000,
    ],
)
def test_a_request_that_is_too_large_is_not_read(address: str, head: bytes) -> None:
    with connected(address) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head)
        assert answer(connection) in (
            b"",  # the rest of the request was on its way when the server ended the connection
            b"HTTP/1.0 431 Request Header Fields Too Large\r\n\r\n",
        )
    assert status(address) == 200


@pytest.mark.parametrize(
    "head", [b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\xff\n\n"]
)
def test_what_is_no_request_breaks_nothing(address: str, head: bytes) -> None:
    with connected(address) as connection:
        connection.sendall(head)
        answer(connection)
    assert status(address) == 200


def test_silent_connections_keep_no_scrape_out_and_hold_few_threads(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition, "_TIME_S", 3600.0)  # so that time ends none of them
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(connected(address))
        assert status(address) == 200
        await_true(lambda: threading.active_count() - before <= exposition._CONNECTIONS)
    assert status(address) == 200


def test_who_opens_many_connections_ends_their_own(address: str) -> None:
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), WAIT_S, ("127.0.0.2", 0)) as other,
        contextlib.ExitStack() as stack,
    ):
        other.sendall(b"GET /metrics HTTP/1.1\r\n")  # and the rest later
        many = [stack.enter_context(connected(address)) for _ in range(2 * exposition._CONNECTIONS)]
        assert answer(many[0]) == b""
        other.sendall(b"\r\n")
        assert b" 200 OK" in answer(other)
