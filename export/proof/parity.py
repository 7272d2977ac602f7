"""What a runtime returns, compared with the reference: names, types, shapes, then values.

`run_probes` runs, `measure` measures and `Measurement.passed` judges; nothing here prints, or stops
an export.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.errors import ParityError, cause
from export.probes import ORDINARY
from export.proof.reference import Reference, spread_by_size
from export.proof.tolerance import largest
from export.quiet import captured
from export.runtimes import Runner, Session
from kan_bundle.golden import Golden, excess, side_by_side
from kan_bundle.manifest import DATATYPES, TensorSpec

_REPORT = "please report it with the checkpoint"
_GOLDEN_ROWS_PER_GROUP = 8
_GOLDEN_BUDGET = 2**19  # numbers of a group, which the server runs in one batch


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
class Failure:
    """Numbers of one output that are wrong at the probes of one group.

    Attributes:
        output: Name of the output.
        group: Of the probes.
        wrong: Numbers that are wrong, over all batch sizes.
        numbers: Numbers compared.
        excess: Largest deviation as a multiple of what was allowed there.
    """

    output: str
    group: str
    wrong: int
    numbers: int
    excess: float


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
        failures: Every output and every group of probes in which a number is wrong.
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
    failures: tuple[Failure, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every output at every probe was as close as it must be."""
        return self.excess <= 1.0


def rows_to_run(reference: Reference) -> int:
    """Count the rows that `run_probes` runs."""
    return sum(len(rows) for rows in reference.rows_by_size)


@captured()
def run_probes(
    run: Runner,
    reference: Reference,
    advance: Callable[[int], None] = lambda rows: None,
    *,
    runtime: str = "the runtime",
) -> NDArray[np.float64]:
    """Run the probes in batches of each of its sizes.

    Args:
        run: A runtime.
        reference: From `make_reference`.
        advance: Receives the number of rows that have been run, time and again.
        runtime: Its name, for messages.

    Returns:
        Outputs, shape (batch sizes, rows, numbers). Where a row is not run in batches of a size,
        its answer in the largest batches stands for it.

    Raises:
        ParityError: The runtime fails, or what it returns has other names, types or shapes than the
            network's outputs.
    """
    probes = reference.probes
    _require_names(runtime, run, reference)

    def run_rows(rows: NDArray[np.intp], size: int) -> NDArray[np.float64]:
        found = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            try:
                outputs = run([array[some] for array in probes.inputs])
            except Exception as error:  # a runtime fails in any way there is
                raise ParityError(
                    f"{runtime} fails on {len(some)} rows at once, nothing was published: "
                    f"{cause(error)}"
                ) from error
            require_tensors(runtime, outputs, reference.specs, len(some))
            found.append(side_by_side(outputs).astype(np.float64))
            advance(len(some))
        return np.concatenate(found)

    runs = [
        run_rows(rows, size)
        for size, rows in zip(
            reversed(reference.batch_sizes), reversed(reference.rows_by_size), strict=True
        )
    ]
    return spread_by_size(list(reversed(runs)), reference.rows_by_size)


def _require_names(runtime: str, run: Runner, reference: Reference) -> None:
    """Compare the names of a file's inputs and outputs with the network's.

    Raises:
        ParityError: They differ, or stand in another order.
    """
    if not isinstance(run, Session):  # TorchScript has none
        return
    for kind, found, specs in (
        ("inputs", run.input_names, reference.inputs),
        ("outputs", run.output_names, reference.specs),
    ):
        expected = tuple(spec.name for spec in specs)
        if found != expected:
            raise ParityError(
                f"{runtime}: expected the {kind} {', '.join(expected)}, found "
                f"{', '.join(found)}, nothing was published; {_REPORT}"
            )


def require_tensors(
    runtime: str, outputs: Sequence[NDArray[Any]], specs: Sequence[TensorSpec], rows: int
) -> None:
    """Compare the number, types and shapes of a runtime's outputs with the network's.

    Raises:
        ParityError: Lists every output that differs.
    """
    expected = [(np.dtype(DATATYPES[s.datatype]), (rows, *s.shape[1:])) for s in specs]
    found = [(output.dtype, output.shape) for output in outputs]
    if found == expected:
        return
    if len(found) != len(expected):
        wrong = [f"expected {len(expected)} outputs, found {len(found)}"]
    else:
        wrong = [
            f"output {spec.name}: expected {e[0]} {e[1]}, found {f[0]} {f[1]}"
            for spec, e, f in zip(specs, expected, found, strict=True)
            if e != f
        ]
    raise ParityError(
        f"{runtime} does not return what the network returns, nothing was published: "
        f"{'; '.join(wrong)}; {_REPORT}"
    )


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
        rows=rows_to_run(reference),
        excess=float(ratio.max()),
        worst=Worst(
            group=str(reference.probes.groups[row]),
            batch_size=reference.batch_sizes[size],
            row=int(row),
            output=int(output),
            expected=float(expected[row, output]),
            found=float(found[size, row, output]),
            allowed=float(reference.tolerance[row, output]),
        ),
        same_argmax=_same_argmax(found, reference) if scores else None,
        failures=tuple(_list_failures(ratio, reference)),
    )


def _list_failures(ratio: NDArray[np.float64], reference: Reference) -> Iterator[Failure]:
    """Count what is wrong by output and group; `ratio` has shape (batch sizes, rows, numbers)."""
    end = 0
    for spec in reference.specs:
        start, end = end, end + math.prod(spec.shape[1:])
        for group in dict.fromkeys(reference.probes.groups.tolist()):
            part = ratio[:, reference.probes.groups == group, start:end]
            wrong = int((part > 1).sum())
            if wrong:
                yield Failure(spec.name, group, wrong, part.size, float(part.max()))


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
