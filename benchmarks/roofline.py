"""The least time that a call can take on this machine, if nothing is done that need not be done.

Of each row and input, order + 2 rows of weights have to be multiplied and added: those of the
functions that do not vanish, and of the base path. Each row of weights that any of them needs has
to be read at least once. How fast this machine multiplies and reads is measured, so that a share of
the limit means the same on all of them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.contenders import ORDER, Model

_SIDE = 1024  # of the product that shows the peak
_SMALLEST_READ = 2**20  # bytes; of fewer, calling torch is what takes time
_TRY_S = 0.3


@dataclass(frozen=True)
class Speed:
    """What a machine can do.

    Args:
        flops: Multiplications and additions of float32 a second.
        read: Bytes a second, of as many bytes as the weights of the model are.
    """

    flops: float
    read: float


def measure_speed(model: Model, threads: int) -> Speed:
    """Measure how fast this machine multiplies, and reads a model's weights over and over."""
    torch.set_num_threads(threads)
    square = torch.rand(_SIDE, _SIDE)
    numbers = torch.rand(max(_SMALLEST_READ, model.weight_bytes) // 4)
    return Speed(
        flops=2 * _SIDE**3 / _fastest(lambda: square @ square),
        read=4 * numbers.numel() / _fastest(numbers.sum),
    )


def limit_ms(model: Model, batch: int, speed: Speed) -> float:
    """Calculate the least time of a call on a batch: layer by layer, the slower of the two."""
    total = 0.0
    for inputs, outputs in pairwise(model.widths):
        flops = 2 * batch * inputs * outputs * (ORDER + 2)
        touched = 4 * inputs * outputs * min(model.bases, batch * (ORDER + 2))
        total += max(flops / speed.flops, touched / speed.read)
    return 1e3 * total


def _fastest(call: Callable[[], Any]) -> float:
    """Find the shortest time of a call, in seconds."""
    call()
    best, end = float("inf"), time.perf_counter() + _TRY_S
    while (started := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - started)
    return best
