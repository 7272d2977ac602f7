"""What is known about the samples: answers that are expected, or targets to score by.

Arrays are read, and compared with the samples and the outputs in type and shape, before anything
long is run. This module knows no file of a bundle, and prints nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from export.errors import InputError, NetworkError, cause, refused_samples
from export.inputs import Inputs, Samples, read_arrays, shown
from export.network import Arrays, Call, Network
from export.proof.eager import LARGEST_BATCH, in_double
from kan_bundle.manifest import TensorSpec

_NUMBERS_AT_ONCE = 2**18
_UNNAMED = "arr_0"  # by numpy.savez

Advance = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Answers:
    """What is known about the samples, by the name of an output, or None without a name.

    Attributes:
        expected: Answers of the network, shape (rows, ...).
        targets: Class labels, or numbers of the output's shape.
        rows: Number of them.
    """

    expected: Mapping[str | None, NDArray[Any]]
    targets: Mapping[str | None, NDArray[Any]]
    rows: int


@dataclass(frozen=True)
class Known:
    """What is known about one output of a network.

    Attributes:
        output: The output.
        columns: Its numbers among those of a row.
        values: Shape (rows, numbers), or (rows,) of class labels.
    """

    output: TensorSpec
    columns: slice
    values: NDArray[Any]


def read_answers(
    expected: Samples | None, targets: Samples | None, inputs: Inputs | None
) -> Answers | None:
    """Read what is known about the samples.

    Args:
        expected: As `read_inputs` takes samples, by the names of the outputs.
        targets: Likewise.
        inputs: With the samples.

    Returns:
        None if nothing is known.

    Raises:
        InputError: Something cannot be read, or there are no samples of as many rows.
    """
    found: dict[str, dict[str | None, NDArray[Any]]] = {}
    for flag, given in (("--expected", expected), ("--targets", targets)):
        found[flag] = {}
        for name, array in read_arrays(given, flag):
            if name in found[flag]:
                raise InputError(
                    f"{flag}: found rows for {name or 'an output without a name'} twice; give "
                    "every output once, as NAME=FILE"
                )
            found[flag][name] = array
        if not found[flag]:
            continue
        if inputs is None or inputs.samples is None:
            raise InputError(
                f"{flag}: is about the rows of --samples, and there are none; give both"
            )
        rows = len(inputs.samples[0])
        for name, array in found[flag].items():
            if array.ndim < 1 or len(array) != rows:
                raise InputError(
                    f"{_label(flag, name)}: expected {rows:,} rows, as the samples have, found an "
                    f"array of shape {array.shape}; give one row for each row of the samples"
                )
    if inputs is None or inputs.samples is None or not any(found.values()):
        return None
    return Answers(found["--expected"], found["--targets"], len(inputs.samples[0]))


def check_answers(answers: Answers, outputs: Sequence[TensorSpec]) -> None:
    """Compare types and shapes with what the network gives.

    Raises:
        InputError: They do not agree.
    """
    fit_expected(answers, outputs)
    fit_targets(answers, outputs)


def in_best_precision(
    network: Network, run: Callable[[Call, torch.dtype], T]
) -> tuple[T, Literal["float64", "float32"]]:
    """Run a network in float64, or in float32 if it does not run in float64.

    Args:
        network: It is as it was when this returns.
        run: Is given the network, and what its inputs are to be.

    Raises:
        NetworkError: It fails in both.
    """
    try:
        with in_double(network.exact) as call:
            return run(call, torch.float64), "float64"
    except Exception:  # the network's own code may fail in any way
        try:
            return run(network.call, torch.float32), "float32"
        except Exception as error:
            if network.inputs.samples is not None:
                raise refused_samples(error) from error
            raise NetworkError(f"the network fails on ordinary rows: {cause(error)}") from error


def fit_expected(answers: Answers, outputs: Sequence[TensorSpec]) -> list[Known]:
    """Find the output of each array of expected answers.

    Raises:
        InputError: There is none, or its type or shape is another.
    """
    found = []
    for spec, columns, array, label in _assign(answers.expected, outputs, "--expected"):
        if array.dtype.kind != "f" or not _same_shape(array.shape, spec.shape):
            raise InputError(
                f"{label}: expected floats of shape {shown(spec.shape)}, as output {spec.name}, "
                f"found {array.dtype} of shape {array.shape}; give what the network answers, or "
                "class labels and targets with --targets"
            )
        found.append(Known(spec, columns, array.reshape(len(array), -1)))
    return found


def fit_targets(answers: Answers, outputs: Sequence[TensorSpec]) -> list[Known]:
    """Find the output of each array of targets.

    Raises:
        InputError: There is none, or its type, its shape or its labels are others.
    """
    found = []
    values: NDArray[Any]
    for spec, columns, array, label in _assign(answers.targets, outputs, "--targets"):
        classes = spec.shape[1] if len(spec.shape) == 2 and spec.shape[1] > 1 else None
        a_row = f"{shown(spec.shape)}, as output {spec.name}"
        labels = f"whole numbers of shape [batch], or floats of shape {a_row}"
        is_column = array.shape[1:] in ((), (1,))
        if array.dtype.kind == "f" and _same_shape(array.shape, spec.shape):
            values = array.reshape(len(array), -1)
            bad = ~np.isfinite(values).all(axis=1)
            if bad.any():
                raise InputError(
                    f"{label}: expected numbers, found NaN or infinity in {bad.sum():,} of "
                    f"{len(bad):,} rows, row {bad.argmax()} first; leave those rows out of "
                    "targets and samples"
                )
        elif array.dtype.kind in "iub" and is_column and classes is not None:
            values = array.reshape(-1).astype(np.int64)
            bad = (values < 0) | (values >= classes)
            if bad.any():
                raise InputError(
                    f"{label}: expected class labels from 0 to {classes - 1}, as output "
                    f"{spec.name} has {classes} numbers, found {values[bad.argmax()]} in row "
                    f"{bad.argmax()}; count the classes from 0"
                )
        else:
            remedy = "give one label, or one row of targets, for each row of the samples"
            if classes is None:
                labels = f"floats of shape {a_row}"
                remedy = "give the targets as floats: y.astype(numpy.float32)"
            elif is_column and array.dtype.kind == "f":
                remedy = "if these are class labels, save them as y.astype(numpy.int64)"
            raise InputError(
                f"{label}: expected {labels}, found {array.dtype} of shape {array.shape}; {remedy}"
            )
        found.append(Known(spec, columns, values))
    return found


def _assign(
    arrays: Mapping[str | None, NDArray[Any]], outputs: Sequence[TensorSpec], flag: str
) -> list[tuple[TensorSpec, slice, NDArray[Any], str]]:
    """Find the output of each array, its numbers among those of a row, and what to call it."""
    names = [spec.name for spec in outputs]
    sizes = [math.prod(spec.shape[1:]) for spec in outputs]
    found = []
    for name, array in arrays.items():
        lone = len(names) == 1 and len(arrays) == 1
        own = names[0] if lone and name in (None, _UNNAMED) else name
        if own not in names:
            raise InputError(
                f"{flag}: expected arrays for {', '.join(names)}, the network's outputs, found "
                f"{name or 'one without a name'}; write NAME=FILE"
            )
        place = names.index(own)
        start = sum(sizes[:place])
        columns = slice(start, start + sizes[place])
        found.append((outputs[place], columns, array, _label(flag, name)))
    return found


def _label(flag: str, name: str | None) -> str:
    return flag if name is None else f"{flag} {name}"


def _same_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Compare shapes behind the batch; a trailing 1 may be there or not."""

    def bare(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:-1] if shape[-1:] == (1,) else shape

    return found[1:] == wanted[1:] or bare(found[1:]) == bare(wanted[1:])


def batches(rows: Arrays) -> list[tuple[int, tuple[NDArray[Any], ...]]]:
    """Part rows into batches, each with the number of its first row."""
    elements = max(array[0].size for array in rows)
    size = int(np.clip(_NUMBERS_AT_ONCE // max(1, elements), 1, LARGEST_BATCH))
    return [
        (start, tuple(array[start : start + size] for array in rows))
        for start in range(0, len(rows[0]), size)
    ]
