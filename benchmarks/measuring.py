"""Time in alternating rounds, and peak memory in a process of its own.

Times: everything compared is alive in one process and takes its turn in every round, so that a
machine that is slower for a while is slower for all. Every runtime has its own worker threads,
which spin for some time after a call: with nothing in between, those of whoever ran before take the
cores, and times become up to five times as long. So each turn begins with a pause, in which they go
to sleep (10 ms are not enough for onnxruntime 1.32, 50 ms are), and calls that are not timed, which
wake its own. So every runtime runs as it does by default in a process that is kept busy with it.

Memory: `python -m benchmarks.measuring CONTENDER FILE INPUTS THREADS` loads and runs one contender
and prints by how many bytes its peaks were above what it held before, with everything imported.
This module imports no runtime.
"""

import gc
import importlib
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import CONTENDERS, Call, Contender, Model

PAUSE_S = 0.05
TURN_S = 0.01
"""A turn has as many timed calls as fill this, at least one, and before them a quarter as many."""
MOST_CALLS = 400
LARGEST_ERROR = 1e-3
"""An answer further than this from the float64 model is another function's."""
_RESET_PEAK = Path("/proc/self/clear_refs")  # 5 makes the peak what the process holds now


@dataclass(frozen=True)
class Timing:
    """Times of single calls, over all rounds.

    Args:
        median_ms: The median.
        p99_ms: The smallest time that 99 in 100 do not exceed.
        samples: How many calls were timed.
    """

    median_ms: float
    p99_ms: float
    samples: int


@dataclass(frozen=True)
class Entry:
    """One contender at one batch size.

    Args:
        contender: Its name.
        batch: Rows in a call.
        timing: How long a call takes.
        error: Largest |y - y64| against the float64 model; None if it computes no answers.
    """

    contender: str
    batch: int
    timing: Timing
    error: float | None

    @property
    def wrong(self) -> bool:
        """Whether the answers are not the model's. NaN is wrong."""
        return self.error is not None and not self.error <= LARGEST_ERROR


@dataclass(frozen=True)
class Memory:
    """What a contender adds to the resident memory of its process, at the largest batch.

    Args:
        calls_bytes: The peak of calls, once it is loaded and was called.
        start_bytes: The peak before that: runtimes hold a file twice for a moment to load it.
    """

    calls_bytes: int
    start_bytes: int

    @property
    def peak_bytes(self) -> int:
        """What has to be there."""
        return max(self.calls_bytes, self.start_bytes)


@dataclass(frozen=True)
class ModelResult:
    """Everything found about one model.

    Args:
        model: Which.
        entries: In the order of the contenders, for one batch size after the other.
        memory: By contender.
        onnx_bytes: Size of kanserve's model.onnx; None if it was not asked for.
        weight_bytes: Size of the folded weights in float32.
        limits_ms: By batch, the least time that a call can take (roofline.py).
    """

    model: Model
    entries: tuple[Entry, ...]
    memory: Mapping[str, Memory]
    onnx_bytes: int | None
    weight_bytes: int
    limits_ms: Mapping[int, float]

    def entry(self, contender: str, batch: int) -> Entry | None:
        """Find a contender's entry; None if it did not run."""
        found = (e for e in self.entries if (e.contender, e.batch) == (contender, batch))
        return next(found, None)

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that ran, ascending."""
        return tuple(sorted({entry.batch for entry in self.entries}))

    @property
    def contenders(self) -> tuple[str, ...]:
        """Who ran, in the order of tables."""
        ran = {entry.contender for entry in self.entries}
        return tuple(name for name in CONTENDERS if name in ran)


@dataclass(frozen=True)
class Results:
    """One run of the benchmark.

    Args:
        machine: What it ran on: processor, cores, threads, versions.
        settings: What was asked for.
        models: What was found.
        skipped: Why a contender did not run, once for each reason.
    """

    machine: Mapping[str, str | int]
    settings: Mapping[str, object]
    models: tuple[ModelResult, ...]
    skipped: tuple[str, ...]


def time_in_rounds(
    calls: Mapping[str, Call], rounds: int, tick: Callable[[], None]
) -> dict[str, Timing]:
    """Time calls against each other.

    Args:
        calls: By name.
        rounds: How often each takes its turn; the order of turns changes from round to round.
        tick: Called after each round.

    Returns:
        The timing of each.
    """
    with _no_garbage_collection():
        counts = {name: _calls_in_a_turn(call) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        names = list(calls)
        order = random.Random(0)
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                time.sleep(PAUSE_S)
                times[name] += _turn(calls[name], counts[name])
            tick()
    return {name: _summary(times[name]) for name in calls}


def _turn(call: Call, count: int) -> list[float]:
    """Time single calls, after some that are not timed; seconds."""
    for _ in range(max(1, count // 4)):
        call()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def _calls_in_a_turn(call: Call) -> int:
    # The first calls of a TorchScript program compile it; these are the third to the fifth.
    fastest = min(_turn(call, 3))
    return min(MOST_CALLS, max(1, math.ceil(TURN_S / fastest)))


def _summary(times: list[float]) -> Timing:
    milliseconds = 1e3 * np.array(times)
    return Timing(
        median_ms=float(np.median(milliseconds)),
        p99_ms=float(np.quantile(milliseconds, 0.99, method="higher")),
        samples=len(times),
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect before and not during: torch's many objects would make it a tenth of a second."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure_memory(contender: Contender, file: Path, inputs: Path, threads: int) -> Memory:
    """Load and run a contender in a new process.

    Args:
        contender: Which.
        file: What it loads.
        inputs: A .npy file with inputs, shape (batch, in).
        threads: For the runtime.

    Returns:
        By how much its resident memory was above what it held before.

    Raises:
        ChildFailed: The process failed, or this system does not tell peaks.
    """
    words = [contender.name, str(file), str(inputs), str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measuring", *words], capture_output=True, text=True
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise ChildFailed(lines[-1] if lines else f"exit code {done.returncode}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


class ChildFailed(Exception):
    """A process that was to measure memory has not."""


def _child(name: str, file: str, inputs: str, threads: str) -> None:
    contender = CONTENDERS[name]
    for module in contender.modules:
        importlib.import_module(module)
    x: NDArray[np.float32] = np.load(inputs)
    gc.collect()
    _RESET_PEAK.write_text("5")
    before = _status("VmRSS")
    call = contender.load(Path(file), int(threads))(x)
    call()
    start = _status("VmHWM")
    gc.collect()
    _RESET_PEAK.write_text("5")
    for _ in range(3):
        call()
    found = Memory(calls_bytes=_status("VmHWM") - before, start_bytes=start - before)
    print(json.dumps(asdict(found)))


def _status(key: str) -> int:
    """Read a size from the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise LookupError(key)


if __name__ == "__main__":
    _child(*sys.argv[1:])
