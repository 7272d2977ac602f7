"""`python -m benchmarks.serving`: our server beside others, under load.

Every server serves the same ONNX file on one CPU; the client has another. In each round every
server is started anew, in another order. The table goes to stdout, as Markdown, and with
serving.json and a plot to the output folder; the story goes to stderr. Exit codes: 0 done, 1 it
cannot be measured here, 2 wrong usage.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import serving_report as report
from benchmarks.engine import describe_machine
from benchmarks.in_process import rows_per_s
from benchmarks.load import Closed, LoadFailed, closed_loop, open_loop
from benchmarks.servers import CONTENDERS, NotStarted, Question, started
from benchmarks.serving_report import Measured, Results, Settings
from export import export_checkpoint
from export.report import Report
from kan_model import KAN

QUICK = Settings(
    contenders=("echo", "kanserve"),
    rows=(1, 256),
    rates=(200.0,),
    seconds=2,
    rounds=1,
)
"""A run of a minute, to see that it runs."""

MODEL = "digits"  # as the rivals call theirs
_SATURATED = 0.9  # of what was offered


def export_model(settings: Settings, folder: Path, seed: int = 0) -> Path:
    """Export a network with random weights.

    Returns:
        The folder of its version.
    """
    torch.manual_seed(seed)
    network = KAN(list(settings.widths), grid_size=settings.grid)
    torch.save(network.state_dict(), folder / f"{MODEL}.pt")
    quiet = Report(Console(file=(folder / "export.log").open("w")))
    export_checkpoint(
        folder / f"{MODEL}.pt", output=folder / "models", activation="silu", report=quiet
    )
    return folder / "models" / MODEL / "1"


def make_question(bundle: Path, columns: int, rows: int) -> Question:
    """Draw some rows, and have onnxruntime answer them."""
    import onnxruntime

    x = np.random.default_rng(rows).uniform(-1, 1, (rows, columns)).astype(np.float32)
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    (expected,) = session.run(None, {"input": x})
    return Question(x, expected)


def measure(settings: Settings, bundle: Path, console: Console) -> Iterator[Measured]:
    """Measure every server in every round, and tell what was left out."""
    questions = {rows: make_question(bundle, settings.widths[0], rows) for rows in settings.rows}
    for turn in range(settings.rounds):
        order = list(settings.contenders)
        random.Random(turn).shuffle(order)
        for name in order:
            console.print(f"round {turn + 1} of {settings.rounds}: {name}", markup=False)
            try:
                yield _measure_one(settings, bundle, name, questions, turn)
            except (NotStarted, LoadFailed) as error:
                console.print(f"left out: {error}", markup=False)
                yield Measured(name, left_out=str(error))


def _measure_one(
    settings: Settings, bundle: Path, name: str, questions: dict[int, Question], turn: int
) -> Measured:
    contender = CONTENDERS[name]
    closed: dict[int, Closed] = {}
    start_s, memory_mb = [], []
    opened = {}
    for rows, question in questions.items():
        # Started anew for each size, so that none is measured in memory that another has left.
        with started(contender, bundle, question, settings.server_cpus) as server:
            start_s.append(server.start_s)
            closed[rows] = closed_loop(
                server.target, settings.connections, settings.seconds, settings.client_cpu
            )
            memory_mb.append(server.memory_mb())
            if rows != min(questions):
                continue
            for rate in settings.rates:
                found = open_loop(
                    server.target,
                    rate,
                    settings.seconds,
                    threads=settings.client_threads,
                    connections=settings.connections,
                    seed=turn,
                    cpu=settings.client_cpu,
                )
                opened[rate] = found
                if found.per_s < _SATURATED * found.offered_per_s:
                    break  # more would only queue in the client
    return Measured(name, closed, opened, min(start_s), max(memory_mb))


def run(settings: Settings, output: Path, console: Console) -> Results:
    """Measure, and write serving.json after every server, serving.md and the plot at the end.

    Args:
        settings: What to measure.
        output: A folder that exists.
        console: For the story.
    """
    machine = describe_machine(1) | {"client": "h2load, grpcio"}
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_model(settings, Path(folder))
        engine = {
            rows: rows_per_s(bundle, rows, settings.seconds, settings.server_cpus)
            for rows in settings.rows
        }
        measured: list[Measured] = []
        for one in measure(settings, bundle, console):
            measured.append(one)
            results = Results(machine, settings, measured, engine)
            (output / "serving.json").write_text(json.dumps(asdict(results), indent=1) + "\n")
    (output / "serving.md").write_text(report.render(results) + "\n")
    report.draw(results, output)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    arguments = vars(_parser().parse_args(argv))
    output: Path = arguments.pop("output")
    preset = QUICK if arguments.pop("quick") else Settings()
    chosen: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in arguments.items()
        if value
    }
    settings = replace(preset, **chosen)
    console = Console(stderr=True, soft_wrap=True)
    if len(os.sched_getaffinity(0)) < 2:
        console.print("error: expected two CPUs, one for the server and one for the client")
        return 1
    try:
        output.mkdir(parents=True, exist_ok=True)
        print(report.render(run(settings, output, console)), flush=True)
    except OSError as error:
        console.print(f"error: {error.filename or output}: {error.strerror or error}", markup=False)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Compare our server with others: throughput, latency, memory, start-up.",
        epilog="`make benchmark-serving` installs the others first, each in its own environment.",
    )
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--widths", nargs="+", type=int, metavar="N", help="of the network")
    parser.add_argument("--server-cpus", metavar="LIST", help="where servers run, e.g. 0,2-3")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="rows in a request")
    parser.add_argument(
        "--rates", nargs="+", type=float, metavar="N", help="requests a second, ascending"
    )
    parser.add_argument("--seconds", type=int, metavar="S", help="of each load")
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each server")
    parser.add_argument("--quick", action="store_true", help="two servers, one round")
    parser.add_argument(
        "--output", type=Path, default=Path("build/benchmark"), metavar="DIR", help="for files"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
