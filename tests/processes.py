"""A server in a process of its own, as its operators have it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


@dataclass
class Process:
    """A server in a process of its own, after it has said that it listens."""

    popen: subprocess.Popen[str]
    address: str
    events: list[dict[str, Any]] = field(default_factory=list)

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    def until(self, name: str) -> dict[str, Any]:
        """Read the log up to an event. Every line must be JSON."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]
        raise AssertionError(f"no {name!r} in the log: {self.events}")


@contextmanager
def serving(
    *arguments: str | Path,
    python: str = sys.executable,
    environment: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[Process]:
    ports = ("--grpc-port", "0", "--metrics-port", "0")
    command = [*prefix, python, "-m", "serving", *map(str, arguments), *ports]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as popen:
        try:
            process = Process(popen, "")
            process.address = process.until("listening")["grpc"]
            yield process
        finally:
            popen.kill()
            popen.communicate()
