"""Rules for the values of inputs, as a server's metadata states them, checked before sending.

The server checks the same with the same words (serving/value_rules.py); neither imports the other.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.client.errors import InvalidRequest
from serving.client.models import Tensor

OUTSIDE = (
    "input {name!r}, {place}: expected whole numbers from {low} to {high}, found {value}; replace "
    "such numbers, or leave such rows out"
)
NAN = (
    "input {name!r}, {place}: expected no NaN, found one, which this model cannot answer; fill in "
    "what is missing, or leave such rows out"
)

_AT_A_TIME = 2**14  # rows: an array may be a file that is larger than memory


def check_values(array: NDArray[Any], spec: Tensor) -> None:
    """Check the values of an input.

    Args:
        array: (rows, ...), of any numbers or booleans.
        spec: The input.

    Raises:
        InvalidRequest: A value is outside of the allowed range, or NaN where a rule excludes it;
            the message names the first.
    """
    if spec.allowed is None and not (spec.rejects_nan and array.dtype.kind == "f"):
        return
    for start in range(0, len(array), _AT_A_TIME):
        part = array[start : start + _AT_A_TIME]
        if spec.rejects_nan and part.dtype.kind == "f":
            place = _first_place(np.isnan(part), start)
            if place is not None:
                raise InvalidRequest(NAN.format(name=spec.name, place=_named(place)))
        if spec.allowed is not None:
            low, high = spec.allowed
            place = _first_place(_outside(part, low, high), start)
            if place is not None:
                value = array[place].item()
                found = {"low": low, "high": high, "value": int(value) if value is True else value}
                raise InvalidRequest(OUTSIDE.format(name=spec.name, place=_named(place), **found))


def _outside(array: NDArray[Any], low: int, high: int) -> NDArray[np.bool_]:
    # numpy compares with no integer of more than 64 bits.
    low, high = max(low, -(2**63)), min(high, 2**63 - 1)
    found: NDArray[np.bool_] = ~((array >= low) & (array <= high))
    return found


def _first_place(excluded: NDArray[np.bool_], start: int) -> tuple[int, ...] | None:
    """Find the first element that is true, in the order of rows; None if there is none.

    Args:
        excluded: Of some rows.
        start: The number of the first of them.
    """
    if not excluded.any():
        return None
    row, *within = (int(i) for i in np.unravel_index(excluded.argmax(), excluded.shape))
    return (start + row, *within)


def _named(place: tuple[int, ...]) -> str:
    row, *within = place
    return f"row {row}" + (f", index {', '.join(map(str, within))}" if within else "")
