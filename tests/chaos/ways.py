"""The ways from a client to three servers: our client's own round robin, and real balancers.

A balancer runs the very file that deploy/balancers has, with nothing but addresses and ports
replaced. Each process is in the foreground, and ended at the end.
"""

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.ports import free_port
from tests.servers import WAIT_S, await_true

BALANCERS = ROOT / "deploy" / "balancers"
NAMES = ("kanserve-1", "kanserve-2", "kanserve-3")

Open = Callable[[Sequence[str], Path], AbstractContextManager[list[str]]]
"""Takes the addresses of three servers and a folder for files, gives those for a client."""


@dataclass(frozen=True)
class Way:
    """A way from a client to servers.

    Args:
        name: Of it.
        open: Makes it.
        program: What it needs, and where that is to be had; None needs nothing.
    """

    name: str
    open: Open
    program: tuple[Callable[[], str | None], str] | None = None

    @property
    def missing(self) -> str:
        """Why it cannot be had here; empty if it can."""
        if self.program is None or self.program[0]() is not None:
            return ""
        return f"{self.name} is not installed ({self.program[1]})"


def rendered(name: str, backends: Sequence[str], listen: str) -> str:
    """A file of deploy/balancers, for these addresses instead of those that it has."""
    text = (BALANCERS / name).read_text()
    places = {
        "nginx.conf": ("listen 8001 ", f"listen {listen} "),
        "haproxy.cfg": ("bind :8001 ", f"bind {listen} "),
        "envoy.yaml": (
            "{address: 0.0.0.0, port_value: 8001}",
            "{{address: {}, port_value: {}}}".format(*listen.split(":")),
        ),
    }
    before, after = places[name]
    assert before in text
    text = text.replace(before, after).replace("port_value: 9901", "port_value: 0")
    for own, backend in zip(NAMES, backends, strict=True):
        host, _, port = backend.partition(":")
        text = text.replace(f"{own}:8001", backend)
        text = text.replace(
            f"address: {own}, port_value: 8001", f"address: {host}, port_value: {port}"
        )
    return text


@contextmanager
def _running(command: Sequence[str], address: str, log: Path) -> Iterator[list[str]]:
    """A balancer in the foreground, from when it takes connections."""
    host, port = address.split(":")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)

    def takes_connections() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(OSError), socket.create_connection((host, int(port)), 1):
            return True
        return False

    try:
        await_true(takes_connections)
        yield [address]
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        try:
            process.wait(WAIT_S)
        finally:
            process.kill()


def nginx_command(config: Path) -> list[str]:
    """nginx with a configuration, with its own files beside that."""
    folder = config.parent
    directives = f"daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log warn;"
    return ["nginx", "-p", str(folder), "-c", str(config), "-g", directives]


def envoy_program() -> str | None:
    """The binary in an environment of its own, or an installed one."""
    found = sorted((ROOT / ".venv-envoy").glob("lib/python*/site-packages/envoy/_bin/envoy"))
    return str(found[0]) if found else shutil.which("envoy")


@contextmanager
def _nginx(backends: Sequence[str], folder: Path) -> Iterator[list[str]]:
    address = f"127.0.0.1:{free_port()}"
    config = folder / "nginx.conf"
    config.write_text(rendered("nginx.conf", backends, address))
    with _running(nginx_command(config), address, folder / "nginx.log") as addresses:
        yield addresses


@contextmanager
def _haproxy(backends: Sequence[str], folder: Path) -> Iterator[list[str]]:
    address = f"127.0.0.1:{free_port()}"
    config = folder / "haproxy.cfg"
    config.write_text(rendered("haproxy.cfg", backends, address))
    command = ["haproxy", "-db", "-f", str(config)]
    with _running(command, address, folder / "haproxy.log") as addresses:
        yield addresses


@contextmanager
def _envoy(backends: Sequence[str], folder: Path) -> Iterator[list[str]]:
    address = f"127.0.0.1:{free_port()}"
    config = folder / "envoy.yaml"
    config.write_text(rendered("envoy.yaml", backends, address))
    program = envoy_program()
    assert program is not None
    command = [program, "-c", str(config), "--log-level", "warning"]
    command += ["--concurrency", "1", "--use-dynamic-base-id"]
    with _running(command, address, folder / "envoy.log") as addresses:
        yield addresses


@contextmanager
def _directly(backends: Sequence[str], folder: Path) -> Iterator[list[str]]:
    yield list(backends)


CLIENT = Way("client", _directly)
WAYS = (
    CLIENT,
    Way("nginx", _nginx, (lambda: shutil.which("nginx"), "Debian's package `nginx-light`")),
    Way("haproxy", _haproxy, (lambda: shutil.which("haproxy"), "Debian's package `haproxy`")),
    Way("envoy", _envoy, (envoy_program, "`make .venv-envoy/installed`")),
)


def every_way() -> list["pytest.ParameterSet"]:
    """Parameters for a test that is to be run over each way; those that are missing are skipped."""
    return [
        pytest.param(
            way, id=way.name, marks=pytest.mark.skipif(bool(way.missing), reason=way.missing or "-")
        )
        for way in WAYS
    ]
