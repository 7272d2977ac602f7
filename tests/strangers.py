"""`python -m tests.strangers`: hostile messages of many kinds, and what they do to honest clients.

For each way to protect a server (none, tokens, TLS with tokens, TLS with certificates) one is
started in a process of its own. Honest clients ask for single rows at a steady pace, first alone,
then while another process, from another address, sends hostile messages to every port, then alone
again. Told are the memory that the server took, the calls that honest clients lost, and their
latency before, meanwhile and after.
"""

import argparse
import gzip
import random
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serving.client import KanClient, Tls
from tests.conftest import STATE_DICTS
from tests.frames import Frames
from tests.processes import serving
from tests.security import Authority, write_access

GOLDEN = STATE_DICTS[0]
TOKEN = "good"
MOST_GROWTH_MB = 200
MOST_SLOWER = 3.0
RECOVERY_S = 2.0
_ATTACKER = "127.0.0.2"
_HELD = 300  # connections that the attacker keeps open
_ATTENTION_S = 0.5  # that the attacker waits for an answer
_MESSAGE_BYTES = 2**22
_PACE_S = 0.005
_CLIENTS = 2
_FIRST_S = 10.0

_SERVICE = "inference.GRPCInferenceService"
_METHODS = {
    "ServerLive": f"/{_SERVICE}/ServerLive",
    "ModelInfer": f"/{_SERVICE}/ModelInfer",
    "ModelStreamInfer": f"/{_SERVICE}/ModelStreamInfer",
    "ModelReady": f"/{_SERVICE}/ModelReady",
    "Check": "/grpc.health.v1.Health/Check",
    "Watch": "/grpc.health.v1.Health/Watch",
    "Reflection": "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
}
_BOMBS = {
    "gzip": gzip.compress(bytes(2**27)),
    "deflate": zlib.compress(bytes(2**27)),
    "gzip of gzip": gzip.compress(gzip.compress(bytes(2**27))),
}


@dataclass
class Target:
    """Where hostile messages go.

    Args:
        grpc: The port of the service.
        health: The port of health alone, without TLS.
        metrics: The port of metrics.
        tls: How the first is spoken to.
        draw: Chance.
        held: Connections that stay open.
    """

    grpc: str
    health: str
    metrics: str
    tls: ssl.SSLContext | None
    draw: random.Random
    held: deque[socket.socket] = field(default_factory=deque)

    def connect(self, address: str, **options: Any) -> Frames:
        tls = self.tls if address == self.grpc else None
        frames = Frames(address, _ATTACKER, tls=tls, **options)
        frames.socket.settimeout(_ATTENTION_S)
        self.hold(frames.socket)
        return frames

    def bare(self, address: str) -> socket.socket:
        host, _, port = address.rpartition(":")
        found = socket.create_connection(
            (host, int(port)), timeout=5, source_address=(_ATTACKER, 0)
        )
        self.hold(found)
        return found

    def hold(self, connection: socket.socket) -> None:
        self.held.append(connection)
        while len(self.held) > _HELD:
            self.held.popleft().close()


Kind = Callable[[Target], object]


def _bomb(method: str, form: str, target: Target) -> None:
    frames = target.connect(_port(method, target))
    frames.send(frames.call(method), _BOMBS[form], compressed=True)
    frames.statuses(1)


def _bomb_without_a_header(method: str, target: Target) -> None:
    frames = target.connect(_port(method, target))
    frames.send(frames.call(method, encoding="identity"), _BOMBS["gzip"], compressed=False)
    frames.statuses(1)


def _headers_alone(method: str, target: Target) -> None:
    frames = target.connect(_port(method, target))
    for _ in range(20):
        frames.call(method)


def _half_a_message(method: str, target: Target) -> None:
    frames = target.connect(_port(method, target))
    frames.send(frames.call(method), bytes(1000), compressed=False, claimed=_MESSAGE_BYTES - 1)


def _large(method: str, target: Target) -> None:
    frames = target.connect(_port(method, target))
    frames.send(frames.call(method), bytes(_MESSAGE_BYTES - 1), compressed=False)
    frames.statuses(1)


def _too_large(method: str, target: Target) -> None:
    frames = target.connect(_port(method, target))
    frames.send(frames.call(method), b"", compressed=False, claimed=2**31)


def _random_bytes(method: str, target: Target) -> None:
    frames = target.connect(_port(method, target))
    content = target.draw.randbytes(target.draw.randrange(1, 2000))
    frames.send(frames.call(method), content, compressed=target.draw.random() < 0.5)
    frames.statuses(1)


def _port(method: str, target: Target) -> str:
    """Health is asked at either port."""
    if "Health" in method and target.draw.random() < 0.5:
        return target.health
    return target.grpc


def _metadata(target: Target, *, acknowledge: bool) -> None:
    frames = target.connect(target.grpc, acknowledge=acknowledge)
    frames.call(_METHODS["ServerLive"], *((f"x-{i}", "x" * 1000) for i in range(60)))
    frames.read()


def _reset(target: Target) -> None:
    frames = target.connect(target.grpc)
    for _ in range(100):
        frames.h2.reset_stream(frames.call(_METHODS["ModelInfer"]))
    frames.flush()


def _pings(target: Target) -> None:
    frames = target.connect(target.grpc)
    for i in range(100):
        frames.h2.ping(i.to_bytes(8, "big"))
    frames.flush()


def _settings(target: Target) -> None:
    frames = target.connect(target.grpc)
    for i in range(100):
        frames.h2.update_settings({4: 65_535 + i})
    frames.flush()


def _encoding(target: Target) -> None:
    frames = target.connect(target.grpc)
    frames.send(frames.call(_METHODS["Check"], encoding="br"), b"abc", compressed=True)
    frames.read()


def _two_messages(target: Target) -> None:
    frames = target.connect(target.grpc)
    stream = frames.call(_METHODS["Check"])
    frames.h2.send_data(stream, bytes(5))
    frames.send(stream, b"", compressed=False)
    frames.statuses(1)


def _watches(target: Target) -> None:
    frames = target.connect(target.grpc)
    for _ in range(100):
        frames.send(frames.call(_METHODS["Watch"]), b"", compressed=False)


def _streams(target: Target) -> None:
    frames = target.connect(target.grpc)
    for _ in range(50):
        frames.call(_METHODS["ModelStreamInfer"])


def _said(words: bytes, port: str, target: Target) -> None:
    target.bare(getattr(target, port)).sendall(words)


def kinds() -> dict[str, Kind]:
    """List every kind of hostile message, by name."""
    found: dict[str, Kind] = {}
    for name, method in _METHODS.items():
        for form in _BOMBS:
            found[f"{form} bomb, {name}"] = partial(_bomb, method, form)
        for kind in (
            *(_bomb_without_a_header, _headers_alone, _half_a_message, _large, _too_large),
            _random_bytes,
        ):
            found[f"{kind.__name__[1:].replace('_', ' ')}, {name}"] = partial(kind, method)
    found |= {
        "large metadata": partial(_metadata, acknowledge=True),
        "large metadata, settings not read": partial(_metadata, acknowledge=False),
        "resets": _reset,
        "pings": _pings,
        "settings": _settings,
        "unknown encoding": _encoding,
        "two messages": _two_messages,
        "watches": _watches,
        "streams": _streams,
    }
    for port in ("grpc", "health", "metrics"):
        for name, words in {
            "silent": b"",
            "half a preface": b"PRI * HTTP/2.0\r\n",
            "noise": random.Random(0).randbytes(500),
            "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
            "half a request": b"GET /metrics HTTP/1.1\r\n",
            "long line": b"GET /" + b"a" * 100_000,
            "TLS": bytes.fromhex("16030100f4010000f00303") + bytes(50),
            "a frame too large": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff" + bytes(6),
        }.items():
            found[f"{name}, {port} port"] = partial(_said, words, port)
    return found


def attack(target: Target, messages: int) -> Counter[str]:
    """Send hostile messages, as many of each kind; tell how often each found no answer."""
    found = list(kinds().items()) * (1 + messages // len(kinds()))
    target.draw.shuffle(found)
    closed: Counter[str] = Counter()
    for name, kind in found[:messages]:
        try:
            kind(target)
        except TimeoutError:
            closed[f"{name}: no answer"] += 1
        except OSError:
            closed[name] += 1
        except Exception as error:  # h2's own, of a server that ends a connection
            closed[f"{name}: {type(error).__name__}"] += 1
    return closed


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

        def ask() -> None:
            with self.connect() as client:
                while not stopped.wait(_PACE_S):
                    started = time.monotonic()
                    try:
                        found = client.infer(GOLDEN.name, GOLDEN.x[:1])
                        assert np.allclose(found, GOLDEN.y64[:1], rtol=1e-4, atol=1e-4)
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
        return float(np.percentile(some, 99)) * 1000


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
    models: Path, flags: Sequence[str], client: dict[str, Any], ca: str, messages: int, seed: int
) -> tuple[dict[str, float], list[str], str]:
    """Attack one server; tell figures, what honest clients lost, and what the attacker saw."""
    limits = ("--max-message-bytes", str(_MESSAGE_BYTES), "--health-port", "0")
    with serving("--model-repository", models, *flags, *limits) as process:
        listening = process.events[-1]
        honest = Honest(lambda: KanClient(process.address, **client))
        pid = process.popen.pid
        threading.Thread(target=_drain, args=(process.popen.stderr,), daemon=True).start()
        with honest.asking():
            time.sleep(2)  # until all is warm
            before = time.monotonic()
            time.sleep(_FIRST_S)
            held = _memory_mb(pid, "VmRSS")
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM counts from here
            start = time.monotonic()
            addresses = [listening[name] for name in ("grpc", "health", "metrics")]
            command = [sys.executable, "-m", "tests.strangers", "--attack", *addresses]
            command += ["--ca", ca, "--messages", str(messages), "--seed", str(seed)]
            saw = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            end = time.monotonic()
            most = _memory_mb(pid, "VmHWM")
            time.sleep(RECOVERY_S + 5)
        assert process.popen.poll() is None, "the server has ended"
        alone, meanwhile = honest.p99_ms(before, start), honest.p99_ms(start, end)
        figures = {
            "s": end - start,
            "MB more": most - held,
            "p99 ms before": alone,
            "meanwhile": meanwhile,
            "times": meanwhile / alone,
            "after 2 s": honest.p99_ms(end + RECOVERY_S, end + RECOVERY_S + 5),
            "calls": len(honest.times),
            "lost": len(honest.lost),
        }
    return figures, honest.lost, saw


def _drain(log: Any) -> None:
    with suppress(ValueError):
        for _ in log:
            pass


def main(argv: Sequence[str] | None = None) -> int:
    """Attack servers, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.strangers", description=main.__doc__)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the way to protect the server")
    parser.add_argument("--attack", nargs=3, metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--ca", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.attack:
        tls = None
        if arguments.ca:
            tls = ssl.create_default_context(cafile=arguments.ca)
            tls.set_alpn_protocols(["h2"])
        target = Target(*arguments.attack, tls=tls, draw=random.Random(arguments.seed))
        print(attack(target, arguments.messages).most_common(10))
        return 0
    from rich.console import Console

    from export import export_checkpoint
    from export.report import Report

    print(f"{arguments.messages:,} messages of {len(kinds())} kinds, seed {arguments.seed}")
    wrong = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quiet = Report(Console(file=(folder / "log").open("w")))
        export_checkpoint(GOLDEN.checkpoint, output=folder / "models", report=quiet)
        for protection, (flags, client, ca) in protections(folder).items():
            if arguments.only in (None, protection):
                figures, lost, saw = try_one(
                    folder / "models", flags, client, ca, arguments.messages, arguments.seed
                )
                print(protection, {key: round(value, 2) for key, value in figures.items()})
                print("  lost:", Counter(lost).most_common(5), " attacker:", saw.strip())
                wrong |= bool(lost) or figures["MB more"] > MOST_GROWTH_MB
                wrong |= figures["times"] > MOST_SLOWER
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
