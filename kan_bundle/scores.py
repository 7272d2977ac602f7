"""What was known about the samples at export: answers that were expected, and scores by targets."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, with_config

_STRICT = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
_Count = Annotated[int, Field(ge=1)]


@_STRICT
@dataclass(frozen=True)
class ExpectedRecord:
    """Answers that the exporter was given, which the network gives on all rows of the samples.

    Attributes:
        outputs: Names of the outputs that were compared.
        rows: Number of them.
        largest: Largest |y - expected|.
        size: Largest magnitude of an expected answer.
    """

    outputs: Annotated[tuple[str, ...], Field(min_length=1, fail_fast=True)]
    rows: _Count
    largest: Annotated[float, Field(ge=0)]
    size: Annotated[float, Field(ge=0)]


@_STRICT
@dataclass(frozen=True)
class ScoreRecord:
    """How good the answers of one runtime are by targets.

    Attributes:
        runtime: `checkpoint` for the network before anything was left out or approximated, else
            that of a `ParityRecord`.
        accuracy: Share of the rows whose largest output is at the class label; None without
            labels.
        rmse: Root mean square of y - target; None with labels.
        mae: Mean of |y - target|; None with labels.
        not_finite: Rows with NaN or infinity in the answer: wrong by their label, and left out of
            the other two.
    """

    runtime: str
    accuracy: Annotated[float, Field(ge=0, le=1)] | None
    rmse: Annotated[float, Field(ge=0)] | None
    mae: Annotated[float, Field(ge=0)] | None
    not_finite: Annotated[int, Field(ge=0)] = 0


@_STRICT
@dataclass(frozen=True)
class TargetsRecord:
    """Scores by the targets of one output, on all rows of the samples.

    Attributes:
        output: Name of the output.
        rows: Number of rows.
        scores: Of the checkpoint first, then of every runtime.
    """

    output: str
    rows: _Count
    scores: tuple[ScoreRecord, ...]
