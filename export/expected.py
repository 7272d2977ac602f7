"""Whether a network gives the answers that are expected of it, on all rows of the samples.

It is compared in float64 where it can run in it. An answer y is as expected if it is off by at most
`SAME * max(s, |y|)`, s being the largest magnitude of that number over the samples: the expected
answers may be float32's, from another machine, batch size or GPU. Where the network itself is
noisier than that in float32, `_NOISE` times its noise is allowed.

A KAN whose base activation the file does not tell is also tried with the others that have a name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from export.answers import Advance, Answers, Known, batches, fit_expected, in_best_precision
from export.arguments import ACTIVATIONS
from export.errors import ExpectationError
from export.network import Arrays, Call, Network
from export.proof.eager import LARGEST_BATCH, evaluate
from kan_bundle.golden import excess
from kan_bundle.manifest import TensorSpec
from kan_bundle.scores import ExpectedRecord
from kan_model import KAN, resolve_activation

SAME = 1e-4
"""Share of an output's size by which an answer may differ from the one expected."""

_NOISE = 16.0  # times what the network in float32 is off
_FEW = 64  # rows that show noise, and whether an activation may fit
_HALF = 1e-2  # share of an output's size that 16 bits or TF32 explain
_NUMBERS_AT_ONCE = 2**20


@dataclass(frozen=True)
class ChosenActivation:
    """A base activation that the checkpoint does not tell.

    Attributes:
        name: As `--activation` takes it.
        assumed: Whether it is the default, which the user has not named.
    """

    name: str
    assumed: bool


def compare_expected(
    network: Network,
    answers: Answers,
    chosen: ChosenActivation | None,
    advance: Advance = lambda rows: None,
) -> ExpectedRecord:
    """Compare the network with the answers expected, on all rows of the samples.

    Args:
        network: It is as it was when this returns.
        answers: With answers expected.
        chosen: A base activation that the file does not tell, if it does not tell it.
        advance: Receives how many rows have been run.

    Raises:
        ExpectationError: The network answers something else.
        InputError: Types or shapes are not those of the outputs.
        NetworkError: The network fails on the samples.
    """
    known = fit_expected(answers, network.outputs)
    rows = network.inputs.samples
    assert rows is not None
    sizes = [_largest_of_each(own.values) for own in known]
    found = _compare(network, known, rows, sizes, advance=advance)
    if found.worst is not None and found.precision == "float64":
        noise = _NOISE * _measure_noise(network, rows, found.worst.row)
        if found.worst.off <= noise[found.worst.column]:
            found = _compare(network, known, rows, sizes, noise)
    if found.worst is not None:
        raise ExpectationError(_explain(network, known, rows, sizes, found, chosen))
    return ExpectedRecord(
        outputs=tuple(own.output.name for own in known),
        rows=len(rows[0]),
        largest=found.largest,
        size=max(float(size.max(initial=0.0)) for size in sizes),
    )


@dataclass(frozen=True)
class _Worst:
    """The answer that is furthest off, in what is allowed for it."""

    output: TensorSpec
    row: int
    column: int
    place: int
    expected: float
    found: float
    allowed: float
    size: float

    @property
    def off(self) -> float:
        return abs(self.found - self.expected)


@dataclass(frozen=True)
class _Comparison:
    """How far answers are from those expected.

    Attributes:
        largest: Largest deviation, where both are numbers.
        wrong: Rows with an answer that is not as expected.
        worst: The worst of them; None if there is none.
        precision: That was compared in.
    """

    largest: float
    wrong: int
    worst: _Worst | None
    precision: Literal["float64", "float32"]


def _compare(
    network: Network,
    known: Sequence[Known],
    rows: Arrays,
    sizes: Sequence[NDArray[np.float64]],
    noise: NDArray[np.float64] | None = None,
    advance: Advance = lambda rows: None,
) -> _Comparison:
    """Compare all rows.

    Args:
        network: It is as it was when this returns.
        known: The answers expected, of these rows.
        rows: Inputs.
        sizes: Largest magnitude of each number, for each of `known`.
        noise: What is allowed at least, for each number of a row of all outputs.
        advance: Receives how many rows have been run.
    """

    def run(call: Call, dtype: torch.dtype) -> tuple[float, int, float, _Worst | None]:
        largest, wrong, most, worst = 0.0, 0, 1.0, None
        for start, some in batches(rows):
            answered = evaluate(call, some, LARGEST_BATCH, dtype)
            bad = np.zeros(len(answered), dtype=bool)
            for own, size in zip(known, sizes, strict=True):
                found = answered[:, own.columns]
                wanted = own.values[start : start + len(found)].astype(np.float64)
                with np.errstate(invalid="ignore"):
                    off = np.abs(found - wanted)
                allowed = SAME * np.maximum(size, np.nan_to_num(np.abs(wanted), posinf=0.0))
                if noise is not None:
                    allowed = np.maximum(allowed, noise[own.columns])
                ratio = excess(found, wanted, allowed)
                bad |= (ratio > 1).any(axis=1)
                largest = max(largest, float(np.nan_to_num(off, posinf=0.0).max(initial=0.0)))
                row, place = np.unravel_index(int(ratio.argmax()), ratio.shape)
                if ratio[row, place] > most:
                    most = float(ratio[row, place])
                    worst = _Worst(
                        output=own.output,
                        row=start + int(row),
                        column=own.columns.start + int(place),
                        place=int(place),
                        expected=float(wanted[row, place]),
                        found=float(found[row, place]),
                        allowed=float(allowed[row, place]),
                        size=float(size[place]),
                    )
            wrong += int(bad.sum())
            advance(len(answered))
        return largest, wrong, most, worst

    (largest, wrong, _, worst), precision = in_best_precision(network, run)
    return _Comparison(largest, wrong, worst, precision)


def _measure_noise(network: Network, rows: Arrays, row: int) -> NDArray[np.float64]:
    """Measure what float32 is off at some rows, for each number of a row."""
    some = tuple(array[_few_rows(rows, row)] for array in rows)
    double, _ = in_best_precision(
        network, lambda call, dtype: evaluate(call, some, LARGEST_BATCH, dtype)
    )
    single = evaluate(network.call, some, LARGEST_BATCH)
    with np.errstate(invalid="ignore"):
        off: NDArray[np.float64] = np.abs(single - double)
    noise: NDArray[np.float64] = np.where(np.isfinite(off), off, 0.0).max(axis=0)
    return noise


def _few_rows(rows: Arrays, row: int) -> NDArray[np.int64]:
    count = len(rows[0])
    return np.unique([*np.linspace(0, count - 1, min(count, _FEW)).astype(int), row])


def _explain(
    network: Network,
    known: Sequence[Known],
    rows: Arrays,
    sizes: Sequence[NDArray[np.float64]],
    found: _Comparison,
    chosen: ChosenActivation | None,
) -> str:
    """Say what is not as expected, and what that usually comes from."""
    worst = found.worst
    assert worst is not None
    shape = worst.output.shape[1:]
    place = ", ".join(map(str, np.unravel_index(worst.place, shape))) if shape else ""
    where = f"{worst.output.name}[{place}]" if place else worst.output.name
    message = (
        f"--expected: {where} in row {worst.row:,} of the samples: expected {worst.expected:.7g}, "
        f"found {worst.found:.7g}, allowed is a deviation of {worst.allowed:.2g}; "
        f"{found.wrong:,} of {len(rows[0]):,} rows are not as expected"
    )
    if chosen is not None:
        how = "was ASSUMED" if chosen.assumed else "was given with --activation"
        tried, fitting = _try_activations(network, known, rows, sizes, worst.row, chosen)
        if fitting:
            others = " or ".join(f"--activation {name}" for name in fitting)
            return (
                f"{message}. The base activation {chosen.name} {how}, and with {others} all "
                "answers are as expected: export with that"
            )
        message += f". The base activation {chosen.name} {how}"
        if tried:
            message += f"; none of {', '.join(tried)} gives the expected answers either"
    if worst.off <= _HALF * max(worst.size, abs(worst.expected)):
        return (
            f"{message}. So small a difference usually comes from answers that were computed with "
            "fewer bits (autocast, half precision, TF32 on a GPU): compute them in float32"
        )
    causes = ["inputs that are normalised before the network, or samples that already are"]
    if chosen is not None and not tried:
        causes.insert(0, "another base activation")
    causes += [
        "another checkpoint (an earlier epoch, an average of weights)",
        "answers computed in training mode (call model.eval())",
        "something computed behind the network (softmax, a scale)",
        "rows in another order",
    ]
    return f"{message}. Usual causes: {'; '.join(causes)}"


def _try_activations(
    network: Network,
    known: Sequence[Known],
    rows: Arrays,
    sizes: Sequence[NDArray[np.float64]],
    row: int,
    chosen: ChosenActivation,
) -> tuple[list[str], list[str]]:
    """Find the activations with which a KAN answers as expected.

    Returns:
        The names of those tried, and of those with which it does.
    """
    kan = network.exact.module
    if not isinstance(kan, KAN) or any(kan.layers[0].base_activation.parameters()):
        return [], []
    few = _few_rows(rows, row)
    some = tuple(array[few] for array in rows)
    known_of_some = [Known(own.output, own.columns, own.values[few]) for own in known]
    before = [layer.base_activation for layer in kan.layers]
    tried, fitting = [], []
    for name in ACTIVATIONS:
        if name == chosen.name.lower():
            continue
        tried.append(name)
        try:
            for layer in kan.layers:
                layer.base_activation = resolve_activation(name)()
            # What fits at some rows is compared at all of them.
            for own, given in ((known_of_some, some), (known, rows)):
                if _compare(network, own, given, sizes).worst is not None:
                    break
            else:
                fitting.append(name)
        finally:
            for layer, activation in zip(kan.layers, before, strict=True):
                layer.base_activation = activation
    return tried, fitting


def _largest_of_each(values: NDArray[Any]) -> NDArray[np.float64]:
    """Find the largest magnitude of each number that is finite, shape (numbers,)."""
    found = np.zeros(values.shape[1])
    step = max(1, _NUMBERS_AT_ONCE // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        magnitude = np.abs(values[start : start + step].astype(np.float64))
        finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
        found = np.maximum(found, finite.max(axis=0))
    return found
