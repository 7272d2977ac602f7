"""How good a network and its files are by targets, on all rows of the samples.

Class labels give the share of rows with the right largest output, numbers the root mean square and
the mean magnitude of what answers are off. All runtimes are scored alike.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.answers import Advance, Answers, Known, batches, fit_targets, in_best_precision
from export.network import Call, Network
from export.proof.eager import LARGEST_BATCH, evaluate
from kan_bundle.golden import side_by_side
from kan_bundle.scores import ScoreRecord, TargetsRecord

CHECKPOINT = "checkpoint"
"""In place of a runtime: the network in float64, before anything was left out or approximated."""

Run = Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]


def score_network(
    network: Network, answers: Answers, runtime: str, advance: Advance = lambda rows: None
) -> tuple[TargetsRecord, ...]:
    """Score a network on all rows of the samples, in float64 if it runs in it.

    Args:
        network: It is as it was when this returns.
        answers: With targets.
        runtime: Name for the record.
        advance: Receives how many rows have been run.

    Raises:
        InputError: Types or shapes are not those of the outputs.
        NetworkError: The network fails on the samples.
    """
    known = fit_targets(answers, network.outputs)
    rows = network.inputs.samples
    assert rows is not None

    def run(call: Call, dtype: torch.dtype) -> list[_Tally]:
        tallies = [_Tally(own) for own in known]
        for start, some in batches(rows):
            found = evaluate(call, some, LARGEST_BATCH, dtype)
            for tally in tallies:
                tally.add(start, found)
            advance(len(found))
        return tallies

    tallies, _ = in_best_precision(network, run)
    return tuple(
        TargetsRecord(own.output.name, len(own.values), (tally.score(runtime),))
        for own, tally in zip(known, tallies, strict=True)
    )


def score_file(
    network: Network,
    answers: Answers,
    runtime: str,
    run: Run,
    before: Sequence[TargetsRecord],
    advance: Advance = lambda rows: None,
) -> tuple[TargetsRecord, ...]:
    """Score a file on all rows of the samples, and put that beside other scores.

    Args:
        network: What it was written from.
        answers: With targets.
        runtime: Name for the record.
        run: The file, loaded.
        before: Scores of others, from `score_network` or from here.
        advance: Receives how many rows have been run.
    """
    known = fit_targets(answers, network.outputs)
    assert network.inputs.samples is not None
    tallies = [_Tally(own) for own in known]
    for start, some in batches(network.inputs.samples):
        found = side_by_side(run(some)).astype(np.float64)
        for tally in tallies:
            tally.add(start, found)
        advance(len(found))
    return tuple(
        TargetsRecord(record.output, record.rows, (*record.scores, tally.score(runtime)))
        for record, tally in zip(before, tallies, strict=True)
    )


class _Tally:
    """Adds up how good answers are, batch by batch."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._rows = self._not_finite = self._right = 0
        self._squares = self._magnitudes = 0.0

    def add(self, start: int, found: NDArray[np.float64]) -> None:
        """Count some rows, from row `start` on, with the numbers of all outputs."""
        own = found[:, self._known.columns]
        wanted = self._known.values[start : start + len(own)]
        finite = np.isfinite(own).all(axis=1)
        self._rows += len(own)
        self._not_finite += int((~finite).sum())
        if wanted.ndim == 1:
            self._right += int((own.argmax(axis=1) == wanted)[finite].sum())
        else:
            off = own[finite] - wanted[finite].astype(np.float64)
            self._squares += float((off**2).sum())
            self._magnitudes += float(np.abs(off).sum())

    def score(self, runtime: str) -> ScoreRecord:
        """Say how good all of them are."""
        if self._known.values.ndim == 1:  # a row without numbers is a wrong one
            return ScoreRecord(runtime, self._right / self._rows, None, None, self._not_finite)
        count = (self._rows - self._not_finite) * self._known.values.shape[1]
        if not count:
            return ScoreRecord(runtime, None, None, None, self._not_finite)
        root = math.sqrt(self._squares / count)
        return ScoreRecord(runtime, None, root, self._magnitudes / count, self._not_finite)
