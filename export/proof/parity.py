"""Proof that the files as written compute what the network computes.

`run_probes` runs, `measure` measures and `Measurement.passed` judges; nothing here prints, or stops
an export.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.probes import ORDINARY
from export.proof.eager import BATCH_SIZES
from export.proof.reference import Reference, largest
from export.quiet import captured
from kan_bundle.golden import Golden, excess, side_by_side

_GOLDEN_ROWS_PER_GROUP = 8
_GOLDEN_BUDGET = 2**19  # numbers of a group, which the server runs in one batch

Runner = Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]
"""Takes one array for each input of a network, (batch, ...); gives one for each output."""


@dataclass(frozen=True)
class Worst:
    """The probe at which a runtime was furthest off, measured in what is allowed there.

    Attributes:
        group: The probe's group.
        batch_size: The batch it ran in.
        row: Its row in the reference's probes.
        output: Index among the numbers of the row.
        expected: The float64 answer.
        found: The runtime's answer.
        allowed: Largest deviation that would have been right.
    """

    group: str
    batch_size: int
    row: int
    output: int
    expected: float
    found: float
    allowed: float


@dataclass(frozen=True)
class Measurement:
    """How far one runtime is from the reference.

    Attributes:
        runtime: What ran.
        max_absolute: Largest |y - y64|.
        max_relative: Largest |y - y64| / max(1, |y64|).
        max_ulp: Largest |y - y64| in float32 units in the last place of y64.
        max_from_eager: Largest |y - eager|, eager in the largest batches.
        rows: Input rows compared.
        excess: Largest deviation as a multiple of what was allowed there; infinite where one
            side is NaN and the other is not.
        worst: Where that was.
        same_argmax: Share of the ordinary probes whose largest output is the reference's largest;
            None unless the network has one output of several numbers.
    """

    runtime: str
    max_absolute: float
    max_relative: float
    max_ulp: float
    max_from_eager: float
    rows: int
    excess: float
    worst: Worst
    same_argmax: float | None

    @property
    def passed(self) -> bool:
        """Whether every output at every probe was as close as it must be."""
        return self.excess <= 1.0


def rows_to_run(reference: Reference) -> int:
    """Count the rows that `run_probes` runs."""
    return len(BATCH_SIZES) * len(reference.probes)


@captured()
def run_probes(
    run: Runner, reference: Reference, advance: Callable[[int], None] = lambda rows: None
) -> NDArray[np.float64]:
    """Run every probe in batches of each of `BATCH_SIZES`.

    Args:
        run: A runtime.
        reference: From `make_reference`.
        advance: Is told how many rows have been run, time and again.

    Returns:
        Outputs, shape (batch sizes, rows, numbers).
    """
    probes = reference.probes

    def run_from(start: int, size: int) -> NDArray[Any]:
        answers = side_by_side(run([array[start : start + size] for array in probes.inputs]))
        advance(len(answers))
        return answers

    return np.stack(
        [
            np.concatenate([run_from(i, size) for i in range(0, len(probes), size)])
            for size in BATCH_SIZES
        ]
    ).astype(np.float64)


def measure(
    runtime: str, found: NDArray[np.float64], reference: Reference, *, scores: bool = False
) -> Measurement:
    """Compare a runtime's outputs with the reference.

    Args:
        runtime: Name for the record.
        found: From `run_probes`, or the reference's own `eager`.
        reference: From `make_reference`.
        scores: Whether the numbers of a row are scores, of which the largest may decide.
    """
    expected = reference.outputs
    normal = np.finfo(np.float32).tiny  # below it units shrink no more
    magnitude = np.clip(np.abs(expected), normal, np.finfo(np.float32).max / 2)
    unit = np.spacing(magnitude.astype(np.float32)).astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.abs(found - expected)  # (batch sizes, rows, out), NaN where both are NaN
        relative = off / np.maximum(1.0, np.abs(expected))
        from_eager = np.abs(found - reference.eager[-1])
    ratio = np.stack([excess(f, expected, reference.tolerance) for f in found])
    size, row, output = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    return Measurement(
        runtime=runtime,
        max_absolute=largest(off),
        max_relative=largest(relative),
        max_ulp=largest(off / unit),
        max_from_eager=largest(from_eager),
        rows=found.shape[0] * found.shape[1],
        excess=float(ratio.max()),
        worst=Worst(
            group=str(reference.probes.groups[row]),
            batch_size=BATCH_SIZES[size],
            row=int(row),
            output=int(output),
            expected=float(expected[row, output]),
            found=float(found[size, row, output]),
            allowed=float(reference.tolerance[row, output]),
        ),
        same_argmax=_same_argmax(found, reference) if scores else None,
    )


def _same_argmax(found: NDArray[np.float64], reference: Reference) -> float | None:
    rows = np.isin(reference.probes.groups, ORDINARY)
    rows &= np.isfinite(reference.outputs).all(axis=1)
    if not rows.any():
        return None
    return float((found[:, rows].argmax(-1) == reference.outputs[rows].argmax(-1)).mean())


def choose_golden(reference: Reference) -> Golden:
    """Pick probes of every group, evenly spread, for the server to replay."""
    elements = sum(array[0].size for array in reference.probes.inputs)
    most = max(1, min(_GOLDEN_ROWS_PER_GROUP, _GOLDEN_BUDGET // max(1, elements)))
    rows = reference.probes.evenly(most)
    return Golden(
        inputs=reference.probes.take(rows).inputs,
        outputs=reference.outputs[rows],
        tolerance=reference.tolerance[rows],
    )


def swallow_nan(
    found: Mapping[str, NDArray[np.float64]], reference: Reference
) -> NDArray[np.bool_]:
    """Find the probes with NaN that onnxruntime answers with numbers where the network has NaN.

    A KANLinear answers NaN with NaN in every runtime. But onnxruntime's MaxPool and Relu, for two,
    give numbers where torch's give NaN, and no form of the graph changes that. It is theirs if
    torch, which runs the same form of the KANLinear layers, keeps the NaN.

    Args:
        found: Outputs by runtime, from `run_probes`.
        reference: From `make_reference`.

    Returns:
        Shape (rows,).
    """
    nan = np.isnan(reference.outputs)
    in_onnx, in_torch = (np.isnan(found[name]) for name in ("onnxruntime cpu", "torchscript"))
    swallowed = (~in_onnx & nan).any(axis=(0, 2)) & ~(in_onnx & ~nan).any(axis=(0, 2))
    kept = (in_torch == nan).all(axis=(0, 2))
    rows: NDArray[np.bool_] = swallowed & kept & (reference.probes.groups == "nan")
    return rows
