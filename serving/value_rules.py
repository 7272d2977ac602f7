"""Rules for the values of inputs: whole numbers that a network accepts, and rows without NaN.

A runtime answers what a rule excludes with plausible numbers, so such a request is rejected before
its rows are run with others. The client checks the same with the same words
(serving/client/value_rules.py); neither imports the other. This module knows numpy alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kan_bundle.manifest import TensorSpec
from serving.errors import InvalidRequest

OUTSIDE = (
    "input {name!r}, {place}: expected whole numbers from {low} to {high}, found {value}; replace "
    "such numbers, or leave such rows out"
)
NAN = (
    "input {name!r}, {place}: expected no NaN, found one, which this model cannot answer; fill in "
    "what is missing, or leave such rows out"
)


def value_rules(inputs: Sequence[TensorSpec]) -> "ValueRules | None":
    """Make the rules of a model; None if it has none, so that its requests need no check.

    Args:
        inputs: The model's inputs, in the manifest's order.
    """
    rules = [(i, spec) for i, spec in enumerate(inputs) if _has_rule(spec)]
    return ValueRules(rules) if rules else None


class ValueRules:
    """The rules of one model; see `value_rules`.

    Args:
        rules: The inputs that have a rule, each with its place among the inputs.
    """

    def __init__(self, rules: Sequence[tuple[int, TensorSpec]]) -> None:
        self._rules = tuple(rules)

    def check(self, inputs: Sequence[NDArray[Any]]) -> None:
        """Check the values of a request.

        Args:
            inputs: One array per input, in the manifest's order, (rows, ...).

        Raises:
            InvalidRequest: A value is outside of the allowed range, or NaN where a rule excludes
                it; the message names the first.
        """
        for i, spec in self._rules:
            array = inputs[i]
            if not array.size:
                continue
            # NaN comes through minimum and maximum, and compares as outside of any range.
            highest = np.maximum.reduce(array, axis=None)
            if spec.rejects_nan and highest != highest:
                place = _first_place(np.isnan(array))
                raise InvalidRequest(NAN.format(name=spec.name, place=_named(place)))
            if spec.allowed is None:
                continue
            low, high = spec.allowed
            if not (highest.item() <= high and np.minimum.reduce(array, axis=None).item() >= low):
                place = _first_outside(array, low, high)
                found = {"low": low, "high": high, "value": array[place].item()}
                raise InvalidRequest(OUTSIDE.format(name=spec.name, place=_named(place), **found))

    def properties(self) -> dict[str, str]:
        """Describe the rules as properties of the model's metadata."""
        found = {}
        for _, spec in self._rules:
            if spec.allowed is not None:
                found[f"input.{spec.name}.allowed"] = "{}..{}".format(*spec.allowed)
            if spec.rejects_nan:
                found[f"input.{spec.name}.rejects_nan"] = "true"
        return found

    def __str__(self) -> str:
        """Describe the rules on one line."""
        parts = []
        for _, spec in self._rules:
            if spec.allowed is not None:
                parts.append(f"{spec.name} in {spec.allowed[0]}..{spec.allowed[1]}")
            if spec.rejects_nan:
                parts.append(f"{spec.name} without NaN")
        return "; ".join(parts)


def _has_rule(spec: TensorSpec) -> bool:
    # Of whole numbers and booleans none is NaN.
    return spec.allowed is not None or (spec.rejects_nan and spec.datatype == "FP32")


def _first_outside(array: NDArray[Any], low: int, high: int) -> tuple[int, ...]:
    # numpy compares with no integer of more than 64 bits.
    low, high = max(low, -(2**63)), min(high, 2**63 - 1)
    return _first_place(~((array >= low) & (array <= high)))


def _first_place(excluded: NDArray[np.bool_]) -> tuple[int, ...]:
    """Find the first element that is true, in the order of rows."""
    return tuple(int(i) for i in np.unravel_index(excluded.argmax(), excluded.shape))


def _named(place: tuple[int, ...]) -> str:
    row, *within = place
    return f"row {row}" + (f", index {', '.join(map(str, within))}" if within else "")
