"""`python -m benchmarks.in_process BUNDLE ROWS SECONDS`: onnxruntime without a server around it.

The session has the options of the server's, and runs on the same CPU. Prints rows a second.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from kan_bundle.manifest import read_manifest
from serving.engine import Engine, EngineOptions

_WARM_UP = 20


def rows_per_s(bundle: Path, rows: int, seconds: float, cpus: str) -> float:
    """Run a model again and again in a process of its own.

    Args:
        bundle: A version's folder.
        rows: In a run.
        seconds: For how long.
        cpus: Where, as taskset takes them.
    """
    command = ["taskset", "-c", cpus, sys.executable, "-m", "benchmarks.in_process"]
    done = subprocess.run(
        [*command, str(bundle), str(rows), str(seconds)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    """Run as the arguments say."""
    bundle, rows, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    manifest = read_manifest(bundle)
    engine = Engine(
        (bundle / "model.onnx").read_bytes(), manifest, bundle, EngineOptions(fused=True)
    )
    columns = manifest.inputs[0].shape[1]
    x = np.random.default_rng(rows).uniform(-1, 1, (rows, columns)).astype(np.float32)
    for _ in range(_WARM_UP):
        engine.run([x])
    start = now = time.perf_counter()
    runs = 0
    while now - start < seconds:
        engine.run([x])
        runs += 1
        now = time.perf_counter()
    print(runs * rows / (now - start))


if __name__ == "__main__":
    main()
