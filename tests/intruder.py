"""`python -m tests.intruder GRPC HEALTH METRICS`: hostile messages of many kinds, to every port.

It imports little, so that it starts at once. `python -m tests.strangers` runs it beside honest
clients.
"""

import argparse
import gzip
import os
import random
import socket
import ssl
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.frames import Frames

LARGEST_BYTES = 2**22
"""What the servers are to accept."""

_ATTACKER = "127.0.0.2"
_HELD = 300  # connections that the attacker keeps open
_ATTENTION_S = 0.5  # that the attacker waits for an answer

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
    frames.send(frames.call(method), bytes(1000), compressed=False, claimed=LARGEST_BYTES - 1)


def _large(method: str, target: Target) -> None:
    frames = target.connect(_port(method, target))
    frames.send(frames.call(method), bytes(LARGEST_BYTES - 1), compressed=False)
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


def _unknown_services(target: Target) -> None:
    frames = target.connect(target.grpc)
    for _ in range(20):
        frames.send(frames.call(_METHODS["Watch"]), b"\x0a\x04none", compressed=False)


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
        "watches of nothing": _unknown_services,
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


def main(argv: Sequence[str] | None = None) -> int:
    """Send hostile messages, and tell which kinds found no answer most often."""
    parser = argparse.ArgumentParser(prog="python -m tests.intruder", description=main.__doc__)
    parser.add_argument("addresses", nargs=3)
    parser.add_argument("--ca", help="who vouches for the first address, which then has TLS")
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    os.nice(19)  # its own work is another machine's, and takes what this one has to spare
    grpc, health, metrics = arguments.addresses
    tls = None
    if arguments.ca:
        tls = ssl.create_default_context(cafile=arguments.ca)
        tls.set_alpn_protocols(["h2"])
    target = Target(grpc, health, metrics, tls, random.Random(arguments.seed))
    print(attack(target, arguments.messages).most_common(10))
    return 0


if __name__ == "__main__":
    sys.exit(main())
