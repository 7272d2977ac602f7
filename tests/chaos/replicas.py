"""Servers that are started, ended, killed and frozen while others of them go on.

Each is a process of its own on a port that it keeps, as one behind a balancer does.
"""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.ports import free_port
from tests.servers import WAIT_S, await_true

DRAIN_S = 1.0
"""Longer than every balancer here takes to notice that a server drains."""


@dataclass
class Replica:
    """One of several servers.

    Args:
        port: It keeps it from life to life.
        folder: For its log.
        flags: Of `python -m serving`.
        environment: In addition to this process's.
        limit: A command that runs the one after it, within some limit.
    """

    port: int
    folder: Path
    flags: Sequence[str | Path]
    environment: Mapping[str, str]
    limit: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Of its last life."""
        return self._log_file.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the log says, line by line."""
        return [json.loads(line) for line in self.log.splitlines()]

    @property
    def _log_file(self) -> Path:
        return self.folder / f"{self.port}.log"

    def sample(self, metric: str) -> float:
        """A metric now, summed over its labels."""
        (listening,) = [event for event in self.events if event["event"] == "listening"]
        with urllib.request.urlopen(f"http://{listening['metrics']}/metrics") as response:
            text = response.read().decode()
        found = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(metric)]
        return sum(map(float, found))

    def launch(self) -> None:
        """Start it, without waiting for it."""
        ports = ["--grpc-port", str(self.port), "--metrics-port", "0"]
        own = [sys.executable, "-m", "serving", *map(str, self.flags), *ports]
        with self._log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.limit, *own], cwd=ROOT, env={**os.environ, **self.environment}, stderr=log
            )

    def await_listening(self) -> None:
        assert self.process is not None
        process = self.process

        def listens() -> bool:
            assert process.poll() is None, self.log
            return '"event": "listening"' in self.log

        await_true(listens)

    def start(self) -> None:
        self.launch()
        self.await_listening()

    def send(self, signum: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(signum)

    def end(self) -> None:
        """SIGTERM, and wait until it is gone; it must say that it is well."""
        self.send(signal.SIGTERM)
        assert self.process is not None
        assert self.process.wait(WAIT_S) == 0, self.log

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(WAIT_S)

    def restart(self) -> None:
        """End it, and start it again."""
        self.end()
        self.start()


@contextmanager
def replicas(
    folder: Path,
    repositories: Sequence[Path],
    *flags: str | Path,
    drain_s: float = DRAIN_S,
    environment: Mapping[str, str] | None = None,
    limits: Sequence[Sequence[str]] = ((), (), ()),
) -> Iterator[list[Replica]]:
    """Servers that listen, one over each repository; at the end all are killed.

    Args:
        folder: For their logs.
        repositories: May all be the same.
        flags: Of each of them.
        drain_s: How long each is there, and not ready, after SIGTERM.
        environment: Of each, in addition to this process's.
        limits: Of each; see `Replica`.
    """
    own = ("--drain-s", str(drain_s), *flags)
    found = [
        Replica(
            free_port(), folder, ("--model-repository", repository, *own), environment or {}, limit
        )
        for repository, limit in zip(repositories, limits, strict=True)
    ]
    try:
        for replica in found:
            replica.launch()
        for replica in found:
            replica.await_listening()
        yield found
    finally:
        for replica in found:
            if replica.process is not None:
                replica.process.kill()
                replica.process.wait(WAIT_S)
