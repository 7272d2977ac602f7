"""`python -m benchmarks.cuda BUNDLE...`: a CUDA device beside the CPU, in process and over gRPC.

Needs an environment with the extra gpu, as `make test-cuda` makes it; with PyTorch for CUDA, the
TorchScript file is measured too. Every time is of a call that takes inputs from the memory of the
CPU and leaves outputs there. Prints two tables for each bundle, as Markdown.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

import kan_ops
from benchmarks.contenders import Call
from benchmarks.load import LoadFailed, closed_loop
from benchmarks.measuring import time_in_rounds
from benchmarks.servers import CONTENDERS, Contender, Question, kanserve, started
from kan_bundle.manifest import read_manifest
from serving import runtime
from serving.engine import Engine, EngineOptions

ROWS = (1, 16, 256, 1024, 4096)
SERVED_ROWS = (1, 16, 256, 1024)
_CONNECTIONS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="MODEL/VERSION")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="turns of each (10)")
    parser.add_argument("--seconds", type=int, default=4, metavar="S", help="of each load (4)")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="CPUs to use (8)")
    parser.add_argument("--only", choices=("in-process", "served"), help="one of the tables")
    arguments = parser.parse_args(argv)
    runtime.prepare("cuda")
    print(
        f"{_device()}; onnxruntime {onnxruntime.__version__}; {arguments.threads} CPUs of ", end=""
    )
    print(f"{os.cpu_count()}; Python {sys.version.split()[0]}", flush=True)
    for bundle in arguments.bundles:
        if arguments.only != "served":
            _print_in_process(bundle, arguments.rounds, arguments.threads)
        if arguments.only != "in-process":
            _print_served(bundle, arguments.seconds, arguments.threads)
    return 0


def _device() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _engines(bundle: Path, threads: int) -> dict[str, Engine]:
    """Load a bundle in every way; what loading takes is told on stderr."""
    most = max(ROWS)
    fused = kan_ops.library_path() is not None
    ways = {
        "CPU, fused" if fused else "CPU": EngineOptions(threads=threads, fused=fused),
        "CUDA": EngineOptions("cuda"),
        "CUDA, graphs": EngineOptions("cuda", graph_rows=most),
        "CUDA, graphs, TF32": EngineOptions("cuda", graph_rows=most, tf32=True),
    }
    manifest, model = read_manifest(bundle), (bundle / "model.onnx").read_bytes()
    engines = {}
    for name, options in ways.items():
        start = time.perf_counter()
        engines[name] = Engine(model, manifest, bundle, options)
        took_s = time.perf_counter() - start
        print(f"{bundle}: {name}: loaded in {took_s:.2f} s", file=sys.stderr, flush=True)
    return engines


def _inputs(bundle: Path, rows: int) -> NDArray[np.float32]:
    (spec,) = read_manifest(bundle).inputs
    random = np.random.default_rng(rows)
    return random.uniform(-1, 1, (rows, *spec.shape[1:])).astype(np.float32)


def _print_in_process(bundle: Path, rounds: int, threads: int) -> None:
    engines = _engines(bundle, threads)
    script = _torchscript(bundle / "model.ts")
    names = [*engines, *(["TorchScript on CUDA"] if script else [])]
    print(f"\n{bundle}, milliseconds a call, median (p99)\n")
    print(f"| rows | {' | '.join(names)} |\n|{'---:|' * (len(names) + 1)}", flush=True)
    for rows in ROWS:
        x = _inputs(bundle, rows)
        calls: dict[str, Call] = {n: partial(engine.run, [x]) for n, engine in engines.items()}
        if script:
            calls["TorchScript on CUDA"] = partial(script, x)
        timings = time_in_rounds(calls, rounds, lambda: None)
        cells = [f"{timings[n].median_ms:.3f} ({timings[n].p99_ms:.3f})" for n in names]
        print(f"| {rows:,} | {' | '.join(cells)} |", flush=True)


def _torchscript(file: Path) -> Callable[[NDArray[np.float32]], NDArray[np.float32]] | None:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or not file.is_file():
        return None
    module = torch.jit.freeze(torch.jit.load(file, map_location="cuda").eval())

    def call(x: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = module(torch.from_numpy(x).cuda()).cpu().numpy()
        return found

    return call


def _print_served(bundle: Path, seconds: int, threads: int) -> None:
    def ours(name: str, *flags: str) -> Contender:
        repository = kanserve(*flags, "--engine-threads", str(threads))
        return Contender(name, "", "grpc", None, repository, rival=False)

    graphs = ("--provider", "cuda", "--cuda-graphs", "on")
    servers = [
        CONTENDERS["echo"],
        ours("CPU"),
        ours("CUDA", "--provider", "cuda"),
        ours("CUDA, graphs", *graphs),
        ours("CUDA, graphs, waits 1 ms", *graphs, "--max-wait-ms", "1"),
    ]
    print(f"\n{bundle}, rows a second over gRPC, {_CONNECTIONS} connections (p99 in ms)\n")
    names = " | ".join(server.name for server in servers)
    print(f"| rows | {names} |\n|{'---:|' * (len(servers) + 1)}", flush=True)
    for rows in SERVED_ROWS:
        x = _inputs(bundle, rows)
        model = (bundle / "model.onnx").read_bytes()
        engine = Engine(model, read_manifest(bundle), bundle, EngineOptions())
        (expected,) = engine.run([x])
        cells = []
        for server in servers:
            with started(server, bundle, Question(x, expected), f"0-{threads - 1}") as running:
                try:
                    found = closed_loop(running.target, _CONNECTIONS, seconds, threads)
                except LoadFailed as error:
                    print(f"{server.name}: {error}", file=sys.stderr)
                    cells.append("-")
                    continue
            cells.append(f"{found.per_s * rows:,.0f} ({found.latencies.p99:.1f})")
        print(f"| {rows:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
