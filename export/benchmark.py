"""How fast each runtime is on this machine: calls of several batch sizes, timed.

A figure here is for choosing between files and runtimes of one model. It comes from a few seconds
on a machine that may do other things; benchmarks/ is where comparisons are made with care.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from export.probes import ORDINARY, Probes
from export.runtimes import Runner

BATCHES = (1, 16, 256, 1024)

_LONGEST_S = 0.4  # for one runtime and batch size
_MOST_CALLS = 1000
_PAUSE_S = 0.05  # until the threads of whoever ran before have gone to sleep
_LARGEST = 2**24  # numbers in a batch of inputs


@dataclass(frozen=True)
class Speed:
    """Calls of one runtime with so many rows.

    Attributes:
        runtime: What ran.
        rows: In a call.
        median_s: Of the calls, in seconds.
        fastest_s: Of the calls, in seconds.
        calls: How many were timed.
    """

    runtime: str
    rows: int
    median_s: float
    fastest_s: float
    calls: int


@dataclass(frozen=True)
class Benchmark:
    """All that was timed, and where."""

    machine: str
    speeds: tuple[Speed, ...]


def benchmark(runtimes: Mapping[str, Callable[[], Runner]], probes: Probes) -> Benchmark:
    """Time each runtime, one after the other, on the ordinary probes.

    Args:
        runtimes: Each is loaded, and let go before the next one is.
        probes: Their ordinary rows, repeated, fill the batches.
    """
    few = probes.take(np.isin(probes.groups, ORDINARY))
    elements = sum(array[0].size for array in few.inputs)
    batches = [rows for rows in BATCHES if rows == 1 or rows * elements <= _LARGEST]
    speeds = []
    for name, load in runtimes.items():
        run = load()
        for rows in batches:
            taken = np.arange(rows) % len(few)
            inputs = [np.ascontiguousarray(array[taken]) for array in few.inputs]
            speeds.append(_time(name, rows, partial(run, inputs)))
        del run
        gc.collect()  # a runtime's own cycles would keep it beside the next one
    return Benchmark(_machine(), tuple(speeds))


def _time(runtime: str, rows: int, call: Callable[[], object]) -> Speed:
    time.sleep(_PAUSE_S)
    call()  # what is set up at the first call is no part of it
    seconds: list[float] = []
    end = time.perf_counter() + _LONGEST_S
    while len(seconds) < _MOST_CALLS and (len(seconds) < 3 or time.perf_counter() < end):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return Speed(runtime, rows, statistics.median(seconds), min(seconds), len(seconds))


def _machine() -> str:
    """Say what ran it: the processor, and how many of them."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cpus} CPUs"
