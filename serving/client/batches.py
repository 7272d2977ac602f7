"""A batch of rows: cut into messages, asked for in any order, put together again.

This module asks nobody: whoever does takes `parts`, sends `request` for each, and hands the answers
to `add`. Rows do not influence each other, so a batch in several messages has the same answer as in
one (to the bit, if the server runs the same rows together; see `ROWS`), as long as one version of
the model gives all of it: `strays` tells which rows it did not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from serving.client.errors import ClientError, InvalidRequest, Overloaded, ServerFault
from serving.client.models import Model
from serving.client.tensors import (
    Inputs,
    checked,
    make_request,
    read_details,
    read_outputs,
    row_bytes,
)

ROWS = 1024
"""Rows in a message, which is what a server runs at a time by default; more would only wait."""

_BYTES = 4 * 2**20  # in a message; more gains nothing


@dataclass(frozen=True)
class Answer:
    """What a model has made of a batch.

    Attributes:
        outputs: Every output that was asked for, by name, each with the rows of the inputs.
        version: Which version of the model it was.
        details: How it came about, one mapping for each message that was sent; empty unless
            details were asked for.
    """

    outputs: Mapping[str, NDArray[Any]]
    version: str
    details: tuple[Mapping[str, bool | int | float | str], ...]


@dataclass(frozen=True)
class Wanted:
    """What is asked of a model, beside the rows.

    Attributes:
        version: Of the model; empty for the newest.
        output: The only one that is wanted; None means all of them.
        single: Whether the answer must be one array.
        details: Whether to ask how the answer came about.
    """

    version: str = ""
    output: str | None = None
    single: bool = False
    details: bool = False


class Batch:
    """Rows that are asked for together.

    Args:
        model: Who is asked.
        inputs: See `Inputs`.
        wanted: What for.
        rows: Most rows in a message; None chooses.

    Attributes:
        parts: The rows of each message, in order; at least one, also if there are no rows.

    Raises:
        InvalidRequest: The inputs are not what the model takes, or it has no such output.
    """

    def __init__(
        self, model: Model, inputs: Inputs, wanted: Wanted, rows: int | None = None
    ) -> None:
        output = wanted.output
        known = [spec.name for spec in model.outputs]
        if output is not None and output not in known:
            raise InvalidRequest(
                f"model {model.name!r}: expected an output of {known}, found {output!r}"
            )
        if wanted.single and output is None and len(known) != 1:
            raise InvalidRequest(
                f"model {model.name!r}: expected one output, found {known}; name one, or use "
                "infer_all"
            )
        self._model = model
        self._arrays = checked(inputs, model)
        self._wanted = wanted
        self._names = () if output is None else (output,)
        self._rows = len(next(iter(self._arrays.values())))
        step = rows or max(1, min(ROWS, _BYTES // max(1, row_bytes(self._arrays, model))))
        step = min(step, model.max_rows or step)
        self.parts = [
            slice(start, min(start + step, self._rows))
            for start in range(0, max(1, self._rows), step)
        ]
        self._outputs: dict[str, NDArray[Any]] = {}
        self._answered: dict[int, tuple[str, Mapping[str, bool | int | float | str]]] = {}

    def request(self, part: slice) -> pb.ModelInferRequest:
        """Write the message for some rows.

        Raises:
            InvalidRequest: A number has no place in its input's type.
        """
        arrays = {name: array[part] for name, array in self._arrays.items()}
        wanted = self._wanted
        return make_request(
            self._model, wanted.version, arrays, self._names, details=wanted.details
        )

    def add(self, part: slice, response: pb.ModelInferResponse) -> None:
        """Take the answer to a part in; a later one replaces it.

        Raises:
            ServerFault: It is no answer to what was asked.
        """
        found = read_outputs(response)
        expected = set(self._names or (spec.name for spec in self._model.outputs))
        if set(found) != expected:
            raise ServerFault(
                f"expected outputs {sorted(expected)}, found {sorted(found)}; the model may have "
                "changed meanwhile"
            )
        for name, array in found.items():
            if name not in self._outputs:
                shape, native = (self._rows, *array.shape[1:]), array.dtype.newbyteorder("=")
                self._outputs[name] = np.empty(shape, native)
            rows = self._outputs[name][part]
            if array.shape != rows.shape:
                raise ServerFault(
                    f"output {name!r}: expected shape {list(rows.shape)} for {len(rows)} rows, "
                    f"found {list(array.shape)}; the model may have changed meanwhile"
                )
            rows[...] = array
        self._answered[part.start] = (response.model_version, read_details(response))

    def pause_s(self, error: ClientError, left_s: float) -> float | None:
        """Tell how long to wait before a part that has failed is asked for again.

        Who sends many messages can wait for room, and must, or all of them are lost with the last.

        Args:
            error: What it has failed with.
            left_s: How much of its time is left.

        Returns:
            Seconds; None if it is not to be asked for again.
        """
        if len(self.parts) == 1 or not isinstance(error, Overloaded):
            return None
        pause_s = error.retry_after_s
        return pause_s if pause_s is not None and pause_s < left_s else None

    def strays(self) -> list[slice]:
        """Find the parts that another version has answered than the last part."""
        version, _ = self._answered[self.parts[-1].start]
        return [part for part in self.parts if self._answered[part.start][0] != version]

    def answer(self) -> Answer:
        """Put the answers of all parts together.

        Raises:
            ServerFault: They are not all of one version.
        """
        versions = {version for version, _ in self._answered.values()}
        if len(versions) > 1:
            raise ServerFault(
                f"model {self._model.name!r}: expected answers of one version, found "
                f"{sorted(versions)}, because servers are changing over; name a version, or ask "
                "again later"
            )
        (version,) = versions
        details = tuple(details for _, details in self._answered.values() if details)
        return Answer(self._outputs, version, details)
