"""The whole numbers that a network accepts in its inputs, found by trial.

An input that is an index into a table (an embedding, a one-hot code) accepts the numbers of its
rows and raises for others, which a runtime may answer. The sizes of such tables are observed: every
operation is recorded that combines a tensor that follows the input, with any other tensor. Each
range that this suggests is then tried, at its ends and beyond them, and only what the network
itself accepts and rejects is claimed.

Observing depends on torch's dispatch modes. Where they fail nothing is claimed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export.inputs import WHOLE_NUMBERS, Inputs
from kan_bundle.manifest import DATATYPES, TensorSpec

Rows = tuple[Tensor, ...]
Run = Callable[[Rows], object]
"""Runs a network, which may raise anything."""

_MAX_NUMBERS = 2**20  # of a recorded tensor
_MAX_TRIED = 32  # bounds on either side
_MAX_DISTANCE = 2**24  # from what is known to be accepted: a network may take memory for a number
_PLACES = 4  # of a row at which numbers beyond a bound are tried one by one


def find_value_ranges(run: Run, inputs: Inputs, rows: Rows) -> Inputs:
    """Find the range of every whole-number input.

    Args:
        run: Runs the network, without gradients.
        inputs: What it takes.
        rows: Inputs that it accepts.

    Returns:
        The inputs, with `allowed` where a range is known that holds all samples.
    """
    specs = list(inputs.specs)
    for i, spec in enumerate(specs):
        if spec.datatype in WHOLE_NUMBERS:
            samples = None if inputs.samples is None else inputs.samples[i]
            ends = None if samples is None else (int(samples.min()), int(samples.max()))
            specs[i] = replace(spec, allowed=_find_range(run, i, spec, rows, ends))
    return replace(inputs, specs=tuple(specs))


def first_rows(run: Run, inputs: Inputs, rows: Rows) -> Rows:
    """Find rows that a network accepts: as given, or with whole numbers of 1 in place of 0.

    Args:
        run: Runs the network.
        inputs: What it takes.
        rows: To begin with; whole numbers are 0 where there are no samples.

    Raises:
        Exception: Whatever the network raises for `rows`, if it accepts neither.
    """
    try:
        run(_copies(rows))
    except Exception:
        whole = [spec.datatype in WHOLE_NUMBERS for spec in inputs.specs]
        if inputs.samples is not None or not any(whole):
            raise
        ones = tuple(
            torch.ones_like(row) if is_whole else row
            for row, is_whole in zip(rows, whole, strict=True)
        )
        if not _accepts(run, ones):
            raise
        return ones
    return rows


def _find_range(
    run: Run, i: int, spec: TensorSpec, rows: Rows, samples: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Find the range of input number `i`; None if there is none, or samples lie outside of it."""
    limits = np.iinfo(np.dtype(DATATYPES[spec.datatype]))
    start = int(rows[i].reshape(-1)[0])
    lows, highs = _suggest(run, i, rows, start)

    def accepts(value: int) -> bool:
        return _accepts(run, _filled(rows, i, value))

    def rejects(value: int) -> bool:
        """Try a number at every place, and at some places alone."""
        if not limits.min <= value <= limits.max:
            return True
        size = rows[i][0].numel()
        places = np.unique(np.linspace(0, size - 1, min(size, _PLACES)).astype(int))
        return not any(
            _accepts(run, _filled(rows, i, value, place)) for place in (None, *places.tolist())
        )

    low = next((n for n in lows if n >= limits.min and accepts(n) and rejects(n - 1)), None)
    high = next((n for n in highs if n <= limits.max and accepts(n) and rejects(n + 1)), None)
    if low is None and high is None:
        return None
    found = (
        int(limits.min) if low is None else low,
        int(limits.max) if high is None else high,
    )
    if found == (limits.min, limits.max):
        return None
    ends = (start, start) if samples is None else samples
    return found if found[0] <= ends[0] and ends[1] <= found[1] else None


def _suggest(run: Run, i: int, rows: Rows, start: int) -> tuple[list[int], list[int]]:
    """Suggest smallest and largest numbers, from what the network does with two numbers."""
    with suppress(Exception):  # the network's own code may fail in any way
        for other in (start + 1, start - 1):
            if _accepts(run, _filled(rows, i, start)) and _accepts(run, _filled(rows, i, other)):
                first = _record(run, _filled(rows, i, start))
                second = _record(run, _filled(rows, i, other))
                found = list(_follow(first, second, start, other))
                lows, highs = (
                    {ends[side] for ends in found if abs(ends[side] - start) <= _MAX_DISTANCE}
                    for side in (0, 1)
                )
                return sorted(lows, key=abs)[:_MAX_TRIED], sorted(highs)[:_MAX_TRIED]
    return [], []


def _follow(
    first: Sequence["_Operation"], second: Sequence["_Operation"], value: int, other: int
) -> Iterator[tuple[int, int]]:
    """Find the tensors that are `slope * input + offset`, and the range that a size beside allows.

    Negative indices count from a table's end where an operation takes them.
    """
    for (name, numbers, sizes), (name_again, numbers_again, _) in zip(first, second, strict=False):
        if name != name_again or len(numbers) != len(numbers_again):
            return
        for before, after in zip(numbers, numbers_again, strict=True):
            if before.shape != after.shape or not before.numel():
                continue
            moved = (after - before).reshape(-1)
            at = int(moved.abs().argmax())
            slope = int(moved[at]) // (other - value)
            if not slope:
                continue
            offset = int(before.reshape(-1)[at]) - slope * value
            for size in sizes:
                for least in (0, -size):
                    ends = sorted([(least - offset) / slope, (size - 1 - offset) / slope])
                    yield math.ceil(ends[0]), math.floor(ends[1])


_Operation = tuple[str, list[Tensor], set[int]]
"""Its name, the whole-number tensors that it is given, and the sizes of all others."""


class _Recorder(TorchDispatchMode):
    """Records the operations that are given whole numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[_Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        given = [*args, *(kwargs or {}).values()]
        parts = [part for v in given for part in (v if isinstance(v, list | tuple) else (v,))]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        whole = [t for t in tensors if t.dtype in (torch.int64, torch.int32, torch.uint8)]
        if len(tensors) > 1 and whole:
            numbers = [t.detach().long().clone() for t in whole if t.numel() <= _MAX_NUMBERS]
            sizes = {size for t in tensors for size in t.shape if size > 1}
            self.operations.append((str(func), numbers, sizes))
        return func(*args, **(kwargs or {}))


def _record(run: Run, rows: Rows) -> list[_Operation]:
    recorder = _Recorder()
    with recorder:
        run(rows)
    return recorder.operations


def _accepts(run: Run, rows: Rows) -> bool:
    try:
        run(_copies(rows))
    except Exception:  # a network rejects numbers in any way
        return False
    return True


def _filled(rows: Rows, i: int, value: int, place: int | None = None) -> Rows:
    """Put one number into an input, everywhere or at one place of every row."""
    filled = rows[i].clone()
    if place is None:
        filled.fill_(value)
    else:
        filled.reshape(len(filled), -1)[:, place] = value
    return (*rows[:i], filled, *rows[i + 1 :])


def _copies(rows: Rows) -> Rows:
    return tuple(row.clone() for row in rows)
