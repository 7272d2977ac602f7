"""`python -m tests.strangers`: hostile messages of many kinds, and what they do to honest clients.

For each way to protect a server (none, tokens, TLS with tokens, TLS with certificates) one is
started in a process of its own. Honest clients ask for single rows at a steady pace, first alone,
then while another process, from another address, sends hostile messages to every port, then alone
again. Told are the memory that the server took, the calls that honest clients lost, and their
latency before, meanwhile and after.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serving.client import KanClient, Tls
from tests.conftest import STATE_DICTS
from tests.intruder import LARGEST_BYTES, kinds
from tests.processes import serving
from tests.security import Authority, write_access

GOLDEN = STATE_DICTS[0]
TOKEN = "good"
MOST_GROWTH_MB = 200
MOST_SLOWER = 3.0
RECOVERY_S = 2.0
_PACE_S = 0.005
_CLIENTS = 2
_ALONE_S = 10.0


@dataclass
class Honest:
    """Clients that ask for a row at a steady pace, and take down how long it takes.

    Args:
        connect: Makes a client.
    """

    connect: Callable[[], KanClient]
    times: list[tuple[float, float]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @contextmanager
    def asking(self) -> Iterator[None]:
        stopped = threading.Event()
        x, expected = GOLDEN.x[:1], GOLDEN.y64[:1]  # files, read once

        def ask() -> None:
            with self.connect() as client:
                while not stopped.wait(_PACE_S):
                    started = time.monotonic()
                    try:
                        found = client.infer(GOLDEN.name, x)
                        assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
                    except Exception as error:
                        self.lost.append(f"{type(error).__name__}: {error}"[:200])
                    self.times.append((started, time.monotonic() - started))

        threads = [threading.Thread(target=ask) for _ in range(_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stopped.set()
            for thread in threads:
                thread.join()

    def p99_ms(self, start: float, end: float) -> float:
        some = [took for at, took in self.times if start <= at < end]
        return float(np.percentile(some, 99)) * 1000 if some else math.nan


def _memory_mb(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise AssertionError(name)


def protections(folder: Path) -> dict[str, tuple[list[str], dict[str, Any], str]]:
    """List ways to protect a server: its flags, an honest client's settings, the attacker's CA."""
    authority = Authority.make(folder / "ca")
    tokens = write_access(folder / "tokens.toml", tokens={"inference": [TOKEN]})
    both = write_access(
        folder / "both.toml",
        tokens={"inference": [TOKEN]},
        certificates={"admin": ["operator.example"]},
    )
    tls = ["--tls-cert", str(authority.cert), "--tls-key", str(authority.key)]
    ca = str(authority.roots)
    return {
        "nothing": ([], {}, ""),
        "tokens": (["--access", str(tokens)], {"token": TOKEN}, ""),
        "TLS and tokens": (
            [*tls, "--access", str(tokens)],
            {"token": TOKEN, "tls": Tls(ca=ca)},
            ca,
        ),
        "certificates in the rules": (
            [*tls, "--access", str(both)],
            {"token": TOKEN, "tls": Tls(ca=ca)},
            ca,
        ),
    }


def try_one(
    models: Path,
    flags: Sequence[str],
    client: dict[str, Any],
    ca: str,
    messages: int,
    seed: int,
    alone_s: float,
) -> tuple[dict[str, float], list[str], str]:
    """Attack one server; tell figures, what honest clients lost, and what the attacker saw.

    Args:
        models: The repository.
        flags: Of the server.
        client: Settings of an honest client.
        ca: Who vouches for the server, for the attacker; empty without TLS.
        messages: Hostile ones.
        seed: Of their order.
        alone_s: How long honest clients ask before and after, in seconds.
    """
    limits = ("--max-message-bytes", str(LARGEST_BYTES), "--health-port", "0")
    faults = {"PYTHONFAULTHANDLER": "1"}
    with serving("--model-repository", models, *flags, *limits, environment=faults) as process:
        listening = process.events[-1]
        honest = Honest(lambda: KanClient(process.address, **client))
        pid = process.popen.pid
        log: deque[str] = deque(maxlen=100)
        threading.Thread(target=_drain, args=(process.popen.stderr, log), daemon=True).start()
        with honest.asking():
            time.sleep(alone_s / 4)  # until all is warm
            before = time.monotonic()
            time.sleep(alone_s)
            held = _memory_mb(pid, "VmRSS")
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM counts from here
            start = time.monotonic()
            addresses = [listening[name] for name in ("grpc", "health", "metrics")]
            options = ["--ca", ca, "--messages", str(messages), "--seed", str(seed)]
            command = [sys.executable, "-m", "tests.intruder", *addresses, *options]
            saw = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            end = time.monotonic()
            code = process.popen.poll()
            assert code is None, f"the server ended with {code}: {''.join(log)}"
            most = _memory_mb(pid, "VmHWM")
            if alone_s:
                time.sleep(RECOVERY_S + alone_s)
        alone, meanwhile = honest.p99_ms(before, start), honest.p99_ms(start, end)
        figures = {
            "s": end - start,
            "MB more": most - held,
            "p99 ms before": alone,
            "meanwhile": meanwhile,
            "times": meanwhile / alone,
            "after 2 s": honest.p99_ms(end + RECOVERY_S, end + RECOVERY_S + alone_s),
            "calls": len(honest.times),
            "lost": len(honest.lost),
        }
    return figures, honest.lost, saw


def _drain(stream: Any, log: deque[str]) -> None:
    with suppress(ValueError):
        log.extend(stream)


def main(argv: Sequence[str] | None = None) -> int:
    """Attack servers, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.strangers", description=main.__doc__)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the way to protect the server")
    arguments = parser.parse_args(argv)
    from rich.console import Console

    from export import export_checkpoint
    from export.report import Report

    seed = arguments.seed
    print(f"{arguments.messages:,} messages of {len(kinds())} kinds, seed {seed}")
    wrong = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quiet = Report(Console(file=(folder / "log").open("w")))
        export_checkpoint(GOLDEN.checkpoint, output=folder / "models", report=quiet)
        for protection, (flags, client, ca) in protections(folder).items():
            if arguments.only in (None, protection):
                figures, lost, saw = try_one(
                    folder / "models",
                    flags,
                    client,
                    ca,
                    arguments.messages,
                    arguments.seed,
                    _ALONE_S,
                )
                print(protection, {key: round(value, 2) for key, value in figures.items()})
                print("  lost:", Counter(lost).most_common(5), " attacker:", saw.strip())
                wrong |= bool(lost) or figures["MB more"] > MOST_GROWTH_MB
                wrong |= figures["times"] > MOST_SLOWER
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
