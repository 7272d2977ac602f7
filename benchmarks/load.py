"""Load on a server: closed and paced loops by h2load, open loops as `kan-client bench` has them.

A closed loop has a fixed number of requests under way, which tells the most that a server can do.
An open loop sends at random moments, whatever the server does (see serving/client/load.py).

`python -m benchmarks.load '{...}'` runs one open loop, in a process of its own, and prints JSON.
"""

import http.client
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grpc

from serving.client.channel import INFER
from serving.client.load import OK, Ask, Latencies, Opened, Trace, latencies_of, poisson_moments
from serving.client.load import open_loop as run_open_loop
from serving.client.load import opened as summed_up

Wire = Literal["grpc", "http"]
"""ModelInfer of the Open Inference Protocol, or a POST of raw float32."""

HTTP_PATH = "/predict"
_LENGTH_PREFIX = 5  # of a message of gRPC
_WARM_UP_S = 1
_DEADLINE_S = 30.0
_SHORT = 1024  # bytes of an answer that is kept


class LoadFailed(Exception):
    """Nothing can be said of the server: the load did not run, or answers were missing."""


@dataclass(frozen=True)
class Target:
    """Whom to ask, and what.

    Args:
        address: Host and port.
        wire: How.
        payload: A file with the message.
        answer_bytes: How long every answer must be; 0 for any length.
        path: Of the URL, over HTTP.
    """

    address: str
    wire: Wire
    payload: str
    answer_bytes: int
    path: str = HTTP_PATH


@dataclass(frozen=True)
class Closed:
    """What a closed loop found.

    Args:
        per_s: Answers in a second.
        latencies: From sending to the end of the answer.
    """

    per_s: float
    latencies: Latencies


def closed_loop(target: Target, connections: int, seconds: int, cpu: int) -> Closed:
    """Keep one request under way on each of so many connections.

    Args:
        target: Whom to ask.
        connections: How many.
        seconds: For how long, after a second that does not count.
        cpu: Where the client runs.

    Raises:
        LoadFailed: h2load is missing, or not every answer was right.
    """
    heard = _by_h2load(target, ["-c", str(connections), "-m", "1"], seconds, cpu)
    # A call that fails ends with HTTP status 200 as well, and without a message.
    if abs(heard.data_bytes - heard.calls * heard.answer_bytes) > connections * heard.answer_bytes:
        raise LoadFailed(
            f"expected {heard.calls} answers of {heard.answer_bytes} bytes, found "
            f"{heard.data_bytes} bytes"
        )
    return Closed(heard.calls / seconds, latencies_of(heard.times_ms))


def paced(target: Target, per_s: float, connections: int, seconds: int, cpu: int) -> Closed:
    """Send at a steady pace, whatever the server does, from a client that is no Python.

    Of what was refused it cannot tell more than that: refusals have no message, and come sooner
    than answers.

    Args:
        target: Whom to ask.
        per_s: Requests to be sent in a second.
        connections: On which they are spread.
        seconds: For how long, after a second that does not count.
        cpu: Where the client runs.

    Returns:
        What was answered.

    Raises:
        LoadFailed: h2load is missing, or there was no answer.
    """
    each = max(1, round(per_s / connections))
    flags = ["-c", str(connections), "-m", "400", "--rps", str(each)]
    heard = _by_h2load(target, flags, seconds, cpu)
    answers = heard.data_bytes // heard.answer_bytes
    if not answers:
        raise LoadFailed("no answers")
    slowest = sorted(heard.times_ms)[-answers:]
    return Closed(answers / seconds, latencies_of(slowest))


class _Calls(NamedTuple):
    """What h2load has seen: every call's time, and the bytes of all answers together."""

    calls: int
    times_ms: Sequence[float]
    data_bytes: int
    answer_bytes: int


def _by_h2load(target: Target, flags: Sequence[str], seconds: int, cpu: int) -> _Calls:
    for program in ("taskset", "h2load"):
        if shutil.which(program) is None:
            raise LoadFailed(f"{program} is missing; install util-linux and nghttp2-client")
    with tempfile.TemporaryDirectory() as folder:
        log, body = Path(folder) / "log", Path(folder) / "body"
        message = Path(target.payload).read_bytes()
        if target.wire == "grpc":
            body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
            options = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
            url, size = INFER, target.answer_bytes + _LENGTH_PREFIX
        else:
            body.write_bytes(message)
            options = ["--h1", "-H", "content-type: application/octet-stream"]
            url, size = target.path, target.answer_bytes
        command = ["taskset", "-c", str(cpu), "h2load", *flags]
        command += [*options, "-d", str(body), f"http://{target.address}{url}", "-D"]
        _h2load([*command, str(_WARM_UP_S)], _WARM_UP_S)  # its own warm-up spoils its sums
        done = _h2load([*command, str(seconds), "--log-file", str(log)], seconds)
        calls = re.search(r"(\d+) done,", done.stdout)
        data = re.search(r"\((\d+)\) data", done.stdout)
        if not calls or not data or not int(calls[1]):
            raise LoadFailed(f"no answers: {(done.stdout + done.stderr)[-200:]!r}")
        times_ms = [int(line.split("\t")[2]) / 1000 for line in log.read_text().splitlines()]
    return _Calls(int(calls[1]), times_ms, int(data[1]), size)


def _h2load(command: Sequence[str], seconds: float) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10 * seconds + 60)
    except subprocess.TimeoutExpired as error:
        raise LoadFailed("h2load did not come to its end") from error


def open_loop(
    target: Target,
    per_s: float,
    seconds: float,
    *,
    threads: int,
    connections: int,
    seed: int,
    cpu: int,
) -> Opened:
    """Send at random moments, so many a second on average.

    Args:
        target: Whom to ask.
        per_s: Requests to be sent in a second.
        seconds: For how long.
        threads: Most requests under way; when they are, the next are late, which counts.
        connections: On which they are spread.
        seed: Of the moments.
        cpu: Where the client runs.

    Raises:
        LoadFailed: The client did not run.
    """
    command = open_loop_command(
        target, per_s, seconds, threads=threads, connections=connections, seed=seed
    )
    done = subprocess.run(
        ["taskset", "-c", str(cpu), *command],
        capture_output=True,
        text=True,
        timeout=10 * seconds + 120,
    )
    return summed_up(trace_of(done.returncode, done.stdout, done.stderr).trace, seconds)


def open_loop_command(
    target: Target, per_s: float, seconds: float, *, threads: int, connections: int, seed: int
) -> list[str]:
    """Write the command of an open loop, whose output `trace_of` reads; see `open_loop`."""
    arguments = {
        "target": asdict(target),
        "per_s": per_s,
        "seconds": seconds,
        "threads": threads,
        "connections": connections,
        "seed": seed,
    }
    return [sys.executable, "-m", "benchmarks.load", json.dumps(arguments)]


@dataclass(frozen=True)
class Heard:
    """An open loop, and what was answered.

    Args:
        trace: Its requests.
        answers: Every answer that came, once, in hexadecimal; long ones are left out.
    """

    trace: Trace
    answers: Sequence[str]


def trace_of(code: int, stdout: str, stderr: str) -> Heard:
    """Read what the command of an open loop has printed.

    Raises:
        LoadFailed: It failed.
    """
    if code:
        raise LoadFailed(f"the client failed: {stderr[-300:]!r}")
    found = json.loads(stdout)
    return Heard(Trace(**found["trace"]), found["answers"])


class Unanswered(Exception):
    """A request has no answer; the message is a status code, or what else there was."""


def transport(
    address: str,
    wire: Wire,
    payload: bytes,
    channel: grpc.Channel | None = None,
    path: str = HTTP_PATH,
) -> Callable[[], bytes]:
    """Make what asks once and gives the answer, or raises Unanswered.

    Args:
        address: Host and port.
        wire: How to ask.
        payload: The message.
        channel: For gRPC, the connection to take; by default one of its own.
        path: Of the URL, over HTTP.
    """
    if wire == "grpc":
        call: Any = (channel or connected(address)).unary_unary(INFER)

        def ask_grpc() -> bytes:
            try:
                answer: bytes = call(payload, timeout=_DEADLINE_S)
            except grpc.RpcError as error:
                raise Unanswered(error.code().name) from error
            return answer

        return ask_grpc
    connection = http.client.HTTPConnection(address, timeout=_DEADLINE_S)

    def ask_http() -> bytes:
        headers = {"content-type": "application/octet-stream"}
        try:
            connection.request("POST", path, payload, headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unanswered(type(error).__name__) from error
        if response.status != 200:
            raise Unanswered(f"HTTP {response.status}")
        return answer

    return ask_http


def connected(address: str) -> grpc.Channel:
    """Make a channel with a connection of its own."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
    ]
    return grpc.insecure_channel(address, options)


def _run(
    target: Target, per_s: float, seconds: float, threads: int, connections: int, seed: int
) -> Heard:
    """Run an open loop in this process."""
    payload = Path(target.payload).read_bytes()
    count = connections if target.wire == "grpc" else 0
    channels = itertools.cycle([connected(target.address) for _ in range(count)] or [None])
    askers = [
        transport(target.address, target.wire, payload, next(channels), target.path)
        for _ in range(threads)
    ]
    for ask in askers[:connections]:
        with suppress(Unanswered):
            ask()  # connects
    answers: set[bytes] = set()

    def judged(ask: Callable[[], bytes]) -> Ask:
        def ask_once() -> str:
            try:
                answer = ask()
            except Unanswered as failed:
                return str(failed)
            if len(answer) <= _SHORT:
                answers.add(answer)
            return OK if target.answer_bytes in (0, len(answer)) else f"{len(answer)} bytes"

        return ask_once

    moments = poisson_moments(per_s, seconds, seed)
    trace = run_open_loop([judged(ask) for ask in askers], moments)
    return Heard(trace, [answer.hex() for answer in answers])


def main() -> None:
    """Run one open loop, as its one argument says, and print what it found."""
    arguments = json.loads(sys.argv[1])
    print(json.dumps(asdict(_run(Target(**arguments.pop("target")), **arguments))))


if __name__ == "__main__":
    main()
