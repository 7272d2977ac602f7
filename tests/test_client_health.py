"""`kan-client health`: what probes are told by servers in every state, and what it costs them."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving.client.__main__ import main
from serving.server import Server
from tests.conftest import ROOT
from tests.processes import serving
from tests.security import Authority
from tests.servers import WAIT_S, await_true, served

LIMIT_S = "0.5"  # for answers that do not come


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run the command in this process: its exit code, stdout and stderr."""

    def ask(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what a server in this process has logged
        code = main(["health", "--timeout-s", str(WAIT_S), *map(str, arguments)])
        return code, *capsys.readouterr()

    return ask


@contextmanager
def silent() -> Iterator[str]:
    """Somebody who takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def closed_port() -> Iterator[str]:
    """Where nobody listens, nor can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_ready_server_is_serving(server: Server, ask: Ask) -> None:
    assert ask("--address", server.address) == (0, f"{server.address} SERVING\n", "")


def test_a_service_is_asked_for_by_its_name(server: Server, ask: Ask) -> None:
    found = ask("--address", server.address, "--service", "inference.GRPCInferenceService")
    assert found == (0, f"{server.address} SERVING\n", "")


def test_a_service_that_is_not_known_is_told_with_1(server: Server, ask: Ask) -> None:
    code, out, error = ask("--address", server.address, "--service", "none")
    assert (code, out) == (1, "")
    assert error.startswith(f"error: {server.address}: expected a service ")
    assert "found 'none'; leave --service out" in error
    named = ("inference.GRPCInferenceService", "live")
    for service in named:
        assert service in error
        code, _out, _error = ask("--address", server.address, "--service", service)
        assert code == 0


def test_a_server_without_tls_is_told_from_one_that_is_away(server: Server, ask: Ask) -> None:
    code, _out, error = ask("--address", server.address, "--tls")
    assert code == 1
    assert error == (
        f"error: {server.address}: the server does not speak TLS; leave out --tls and the "
        "certificates (tls=None), or give the address of one that does\n"
    )


def test_a_draining_server_is_not_serving_with_1(repository: Path, ask: Ask) -> None:
    with served(repository) as (server, _):
        server.drain()
        found = ask("--address", server.address)
        assert found == (1, f"{server.address} NOT_SERVING\n", "")


def test_where_nobody_listens_is_one_line_with_1(ask: Ask) -> None:
    with closed_port() as address:
        code, out, error = ask("--address", address)
    assert (code, out) == (1, "")
    assert error.startswith(f"error: {address}: ")
    assert "Connection refused" in error
    assert error.count("\n") == 1


def test_who_does_not_answer_is_not_waited_for(ask: Ask) -> None:
    with silent() as address:
        code, out, error = ask("--address", address, "--timeout-s", LIMIT_S)
    assert (code, out) == (1, "")
    assert error.startswith(f"error: {address}: ")
    assert error.count("\n") == 1


def test_every_address_is_asked_and_every_one_must_be_serving(
    server: Server, repository: Path, ask: Ask
) -> None:
    with served(repository) as (other, _), closed_port() as gone:
        both = f"{server.address},{other.address}"
        code, out, _error = ask("--address", both)
        assert code == 0
        assert out == f"{server.address} SERVING\n{other.address} SERVING\n"
        other.drain()
        code, out, error = ask("--address", f"{gone},{both}")
        assert code == 1
        assert out == f"{server.address} SERVING\n{other.address} NOT_SERVING\n"
        assert error.startswith(f"error: {gone}: ")


def test_tls_is_spoken_as_by_the_other_commands(repository: Path, tmp_path: Path, ask: Ask) -> None:
    authority = Authority.make(tmp_path / "tls")
    cert, key = authority.write_client("probe")
    own = ("--ca", authority.roots, "--cert", cert, "--key", key)
    with served(repository, **authority.settings(mutual=True)) as (server, _):
        where = ("--address", server.address)
        assert ask(*where, *own) == (0, f"{server.address} SERVING\n", "")
        for less in ((), own[:2]):
            code, out, error = ask(*where, *less, "--timeout-s", LIMIT_S)
            assert (code, out) == (1, "")
            assert error.startswith(f"error: {server.address}: ")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--address", "kan"], "address 'kan': expected host:port"),
        (["--address", "127.0.0.1:1,"], "address '': expected host:port"),
        (["--ca", "none.pem"], "none.pem: cannot be read"),
    ],
)
def test_flags_without_a_usable_value_end_with_2(flags: list[str], told: str, ask: Ask) -> None:
    code, _out, error = ask(*flags)
    assert code == 2
    assert told in error


def test_a_server_in_a_process_of_its_own_is_seen_to_come_and_to_go(repository: Path) -> None:
    with serving("--model-repository", repository, "--drain-s", "600") as process:
        ask = [sys.executable, "-W", "error", "-m", "serving.client", "health"]
        ask += ["--address", process.address, "--timeout-s", str(WAIT_S)]

        def status() -> tuple[int, str]:
            done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
            return done.returncode, done.stdout + done.stderr

        assert status() == (0, f"{process.address} SERVING\n")
        process.popen.terminate()
        process.until("draining")
        await_true(lambda: status() == (1, f"{process.address} NOT_SERVING\n"))


def test_a_probe_imports_nothing_that_it_does_not_need() -> None:
    script = (
        "import sys, serving.client.__main__ as client; code = client.main(['health', '--address',"
        " '127.0.0.1:1']); heavy = {'numpy', 'matplotlib', 'rich', 'onnxruntime', 'pydantic'};"
        "print(sorted(heavy & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert done.stderr.startswith("error: 127.0.0.1:1: ")
