"""`python -m benchmarks.stress overload|swaps|restarts`: what our server does when it is hard.

- overload: one, two and five times the requests that it can answer.
- swaps: versions of a model come and go under load, each a new folder and a call to load it.
- restarts: one of three servers after the other is sent SIGTERM under load, and started again.

A table goes to stdout, as Markdown, the story to stderr. Exit codes: 0 done, 1 it cannot be
measured here, 2 wrong usage.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks.load import (
    Heard,
    LoadFailed,
    closed_loop,
    open_loop,
    open_loop_command,
    paced,
    trace_of,
)
from benchmarks.servers import (
    CONTENDERS,
    Contender,
    NotStarted,
    Question,
    free_port,
    kanserve,
    started,
)
from benchmarks.serving import MODEL, export_model, make_question
from benchmarks.serving_report import Settings, table
from kan_bundle.manifest import read_manifest, write_manifest
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client.channel import connection_to
from serving.client.load import Latencies, latencies_of
from serving.settings import Settings as ServerSettings

_ANYWHERE = f"0-{(os.cpu_count() or 1) - 1}"
_SWAP_EVERY_S = 0.15
_SWAPS_PER_S = 400.0
_CLIENTS = 16
_DEADLINE_S = 2.0


def overload(console: Console, seconds: int) -> list[str]:
    """Offer more than can be done, in requests of 256 rows, to a server on one CPU.

    Args:
        console: For the story.
        seconds: Of each load.

    Returns:
        Lines of Markdown.
    """
    settings = Settings(widths=(64, 256, 256, 10))  # work enough for a client of Python to offer
    rows = 256
    places = ServerSettings.model_fields["max_queue_rows"].default // rows
    found = []
    with exported(settings) as bundle:
        question = make_question(bundle, settings.widths[0], rows)
        with started(CONTENDERS["kanserve"], bundle, question, settings.server_cpus) as server:
            peak = closed_loop(server.target, 8, seconds, settings.client_cpu).per_s
            console.print(f"at saturation {peak:.0f} requests a second", markup=False)
            for factor in (0.5, 1, 2, 5):
                console.print(f"{factor} times as many", markup=False)
                load = open_loop(
                    server.target,
                    factor * peak,
                    seconds,
                    threads=1024,
                    connections=16,
                    seed=1,
                    cpu=settings.client_cpu,
                )
                steady = paced(server.target, factor * peak, 16, seconds, settings.client_cpu)
                codes = Counter(load.codes)
                refused = codes["RESOURCE_EXHAUSTED"] / codes.total()
                others = codes.total() - codes["OK"] - codes["RESOURCE_EXHAUSTED"]
                found.append(
                    [
                        f"{factor} x, {load.offered_per_s:,.0f}/s",
                        f"{load.per_s:,.0f}",
                        f"{load.per_s / peak:.2f}",
                        _shown(load.latencies),
                        f"{steady.per_s / peak:.2f}",
                        _shown(steady.latencies),
                        f"{1000 * places / steady.per_s:,.0f}",
                        f"{refused:.0%}",
                        str(others),
                        f"{server.memory_mb():.0f}",
                    ]
                )
    head = ["offered", "answered/s", "of peak", "p50 / p99 / p99.9, ms"]
    head += ["steadily: of peak", "p50 / p99 / p99.9, ms", "room, ms"]
    return [
        *table([*head, "refused", "failed otherwise", "memory, MB"], found),
        "",
        f"There is room for {places} such requests, which at full pace is "
        f"{1000 * places / peak:,.0f} ms. At random moments a client of Python asks, "
        "steadily h2load.",
    ]


def swaps(console: Console, seconds: int, count: int) -> list[str]:
    """Change over from version to version while single rows are asked for.

    Args:
        console: For the story.
        seconds: Of load before the first swap.
        count: How many swaps.

    Returns:
        Lines of Markdown.
    """
    flags = ["--model-control", "explicit", "--load-models", json.dumps([MODEL])]
    contender = replace(CONTENDERS["kanserve"], arguments=kanserve(*flags))
    settings = Settings()
    total_s = seconds + 1.5 * _SWAP_EVERY_S * count
    with exported(settings) as first, exported(settings, seed=1) as second:
        questions = [make_question(b, settings.widths[0], 1) for b in (second, first)]
        aside = _versions(first, second, range(2, count + 2))
        with started(contender, first, questions[1], _ANYWHERE) as server:
            channel = grpc.insecure_channel(server.target.address)
            stub = GRPCInferenceServiceStub(channel)
            command = open_loop_command(
                replace(server.target, answer_bytes=0),  # versions have more digits
                _SWAPS_PER_S,
                total_s,
                threads=32,
                connections=8,
                seed=0,
            )
            client = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            time.sleep(seconds)
            before_mb = server.memory_mb()
            windows = []
            for version in track(
                range(2, count + 2), description="swaps", console=console, transient=True
            ):
                begun = time.monotonic()
                (aside / str(version)).rename(first.parent / str(version))
                stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=MODEL))
                windows.append((begun, time.monotonic()))
                shutil.rmtree(first.parent / str(version - 1))
                time.sleep(max(0.0, begun + _SWAP_EVERY_S - time.monotonic()))
            after_mb = server.memory_mb()
            stdout, stderr = client.communicate()
    heard = trace_of(client.returncode, stdout, stderr)
    _require_right(heard, [question.expected for question in questions])
    return _swap_lines(heard, windows, before_mb, after_mb)


def _versions(first: Path, second: Path, versions: Sequence[int]) -> Path:
    """Write bundles that need only be moved to be versions: odd ones the first, even the second."""
    aside = first.parent.parent.parent / "aside"
    for version in versions:
        folder = aside / str(version)
        shutil.copytree(first if version % 2 else second, folder)
        write_manifest(replace(read_manifest(folder), version=version), folder)
    return aside


def _require_right(heard: Heard, expected: Sequence[NDArray[np.float32]]) -> None:
    """Compare every answer with what its version must say."""
    for text in heard.answers:
        answer = pb.ModelInferResponse.FromString(bytes.fromhex(text))
        found = np.frombuffer(answer.raw_output_contents[0], "<f4")
        wanted = expected[int(answer.model_version) % 2].ravel()
        if not np.allclose(found, wanted, rtol=1e-5, atol=1e-5):
            raise LoadFailed(f"version {answer.model_version} gave {found}, expected {wanted}")


def _swap_lines(
    heard: Heard, windows: Sequence[tuple[float, float]], before_mb: float, after_mb: float
) -> list[str]:
    trace = heard.trace
    starts, ends = np.array(windows).T
    moments, times_ms = np.array(trace.moments), np.array(trace.times_ms)
    last = np.searchsorted(starts, moments, side="right") - 1
    during = (last >= 0) & (moments <= ends[last])
    before = moments < starts[0]
    codes = Counter(trace.codes)
    versions = {
        pb.ModelInferResponse.FromString(bytes.fromhex(text)).model_version
        for text in heard.answers
    }
    rows = [
        [name, f"{len(times):,}", _shown(latencies_of(times))]
        for name, times in (
            ("before", times_ms[before].tolist()),
            ("while a version is loaded", times_ms[during].tolist()),
            ("between swaps", times_ms[~during & ~before].tolist()),
        )
    ]
    took_ms = 1000 * float(np.median(ends - starts))
    return [
        *table(["requests that came", "", "p50 / p99 / p99.9, ms"], rows),
        "",
        f"{len(windows)} swaps, each {took_ms:.0f} ms; {codes.total():,} requests, of which "
        f"{codes.total() - codes['OK']} failed and none was answered wrongly; {len(versions)} "
        f"versions answered; memory {before_mb:.0f} MB before, {after_mb:.0f} MB after.",
    ]


@dataclass
class _Tally:
    """What clients that ask without a pause have seen."""

    question: Question
    codes: Counter[str]
    wrong: int = 0

    def ask(self, stub: GRPCInferenceServiceStub, stop: threading.Event) -> None:
        request = pb.ModelInferRequest.FromString(self.question.message(MODEL, "grpc"))
        while not stop.is_set():
            try:
                answer = stub.ModelInfer(request, timeout=_DEADLINE_S)
            except grpc.RpcError as error:
                self.codes[error.code().name] += 1
                continue
            self.codes["OK"] += 1
            self.wrong += not self.question.is_answered_by(answer.SerializeToString(), "grpc")


def restarts(console: Console, count: int) -> list[str]:
    """End one of three servers after the other, and start it again.

    Args:
        console: For the story.
        count: How many are ended.

    Returns:
        Lines of Markdown.
    """
    settings = Settings()
    contender = replace(CONTENDERS["kanserve"], arguments=kanserve(drain_s=0.5))
    ports = [free_port() for _ in range(3)]
    with exported(settings) as bundle, ExitStack() as channels:
        question = make_question(bundle, settings.widths[0], 1)
        tally, stop = _Tally(question, Counter()), threading.Event()
        servers = [_Replica(contender, bundle, question, port) for port in ports]
        for server in servers:
            server.start()
        connection = connection_to([f"127.0.0.1:{port}" for port in ports])
        channel = channels.enter_context(connection.open())
        stub = GRPCInferenceServiceStub(channel)
        clients = [threading.Thread(target=tally.ask, args=(stub, stop)) for _ in range(_CLIENTS)]
        for client in clients:
            client.start()
        try:
            for i in track(range(count), description="restarts", console=console, transient=True):
                server = servers[i % len(servers)]
                server.end()
                server.start()
                time.sleep(1.0)  # for the client to find it again
        finally:
            stop.set()
            for client in clients:
                client.join()
            for server in servers:
                server.end()
    failed = {code: n for code, n in tally.codes.items() if code != "OK"}
    return [
        f"{count} times SIGTERM, one of three servers after the other, {_CLIENTS} clients: "
        f"{tally.codes.total():,} requests, {tally.wrong} wrong answers, "
        f"{sum(failed.values())} failed{f' ({failed})' if failed else ''}."
    ]


class _Replica:
    """A server that is started and ended more than once."""

    def __init__(self, contender: Contender, bundle: Path, question: Question, port: int) -> None:
        self._arguments = (contender, bundle, question, _ANYWHERE, port)
        self._running = ExitStack()

    def start(self) -> None:
        self._running.enter_context(started(*self._arguments))

    def end(self) -> None:
        self._running.close()


@contextmanager
def exported(settings: Settings, seed: int = 0) -> Iterator[Path]:
    """A network with random weights, exported; its version's folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield export_model(settings, Path(folder), seed)


def _shown(latencies: Latencies | None) -> str:
    if latencies is None:
        return "-"
    return f"{latencies.p50:.3g} / {latencies.p99:.3g} / {latencies.p999:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stress",
        description="What our server does under overload, swaps of versions, and restarts.",
    )
    parser.add_argument("what", choices=["overload", "swaps", "restarts"])
    parser.add_argument("--seconds", type=int, default=10, help="of each load")
    parser.add_argument("--count", type=int, help="of swaps (200) or restarts (16)")
    arguments = parser.parse_args(argv)
    console = Console(stderr=True, soft_wrap=True)
    try:
        if arguments.what == "overload":
            lines = overload(console, arguments.seconds)
        elif arguments.what == "swaps":
            lines = swaps(console, arguments.seconds, arguments.count or 200)
        else:
            lines = restarts(console, arguments.count or 16)
    except (LoadFailed, NotStarted) as error:
        console.print(f"error: {error}", markup=False)
        return 1
    print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
