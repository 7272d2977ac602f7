"""`kan-client` as a shell runs it, in this process, against a server that the test speaks for."""

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from serving.client import commands
from serving.client.__main__ import main
from tests.bare import Bare, answering
from tests.servers import WAIT_S

TWICE = {"inputs": {"a": ("FP32", [-1, 2])}, "outputs": ("twice",)}
"""A model of one input and one output."""


def without_waiting(error: str) -> str:
    """What the command said on stderr, but not that it waits, as it may on a busy machine."""
    return re.sub(r"(?m)^waiting for .*\n", "", error)


@dataclass
class Shell:
    """The command, run in this process against one server."""

    address: str
    servicer: Bare
    capsysbinary: pytest.CaptureFixture[bytes]
    error: str = ""

    def __call__(self, command: str, *arguments: object, code: int = 0) -> bytes:
        """Run it; what it says on stderr is kept, stdout returned."""
        found = main([command, "--address", self.address, *map(str, arguments)])
        out, err = self.capsysbinary.readouterr()
        self.error = err.decode()
        assert found == code, self.error
        assert "Traceback" not in self.error
        return out

    def infer(self, *arguments: object, code: int = 0) -> bytes:
        return self("infer", "--model", "pair", *arguments, code=code)


@pytest.fixture
def bare() -> Bare:
    return Bare(**TWICE)  # type: ignore[arg-type]


@pytest.fixture
def shell(
    bare: Bare, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    monkeypatch.setattr(commands, "_SILENT_S", WAIT_S)  # a busy machine says nothing of its own
    before = signal.getsignal(signal.SIGTERM)
    with answering(bare) as port:
        yield Shell(f"127.0.0.1:{port}", bare, capsysbinary)
    signal.signal(signal.SIGTERM, before)
