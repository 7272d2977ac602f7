"""Arrays to messages, and back. Everything is checked against what the model takes, before sending.

An array of another type than the model's is converted where that loses nothing; the one exception
is that floats are rounded to the model's precision, because float64 is what numpy makes by default.
So whole numbers and booleans may be given for floats or for wider whole numbers, as long as every
value has its place; floats for whole numbers are refused, even if they are whole, because a wrong
array looks just like that.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from protos import inference_pb2 as pb
from serving.client.errors import InvalidRequest, ServerFault
from serving.client.models import DTYPES, Model, Tensor
from serving.client.value_rules import check_values

DETAILS = "kanserve_details"
"""The request parameter that asks how an answer came about."""

Inputs = ArrayLike | Mapping[str, ArrayLike]
"""An array for a model with one input; names to arrays for any."""

_LOOKED_AT = 2**14  # rows
_MAX_DEPTH = 8  # of lists in lists
_MAX_DETAILS = 300  # characters of another program's message
_MAY_BECOME = {"f": "fiub", "i": "iub", "u": "iub", "b": "b"}
_KINDS = {"f": "floats or whole numbers", "i": "whole numbers", "u": "whole numbers", "b": "bools"}


def checked(inputs: Inputs, model: Model) -> dict[str, NDArray[Any]]:
    """Find the array of every input, in the model's order, and see that it fits.

    Args:
        inputs: See `Inputs`.
        model: What takes them.

    Raises:
        InvalidRequest: A name, a type, a shape, a number of rows or a value is not what the model
            takes.
    """
    names = [spec.name for spec in model.inputs]
    if not isinstance(inputs, Mapping):
        if len(names) != 1:
            raise InvalidRequest(
                f"model {model.name!r}: expected inputs {names}, found one array; pass a mapping "
                "of names to arrays"
            )
        inputs = {names[0]: inputs}
    if set(inputs) != set(names):
        raise InvalidRequest(
            f"model {model.name!r}: expected inputs {names}, found {_shown(list(inputs))}"
        )
    arrays = {spec.name: _fitting(inputs[spec.name], spec) for spec in model.inputs}
    rows = {name: len(array) for name, array in arrays.items()}
    if len(set(rows.values())) > 1:
        raise InvalidRequest(f"expected the same number of rows in every input, found {rows}")
    for spec in model.inputs:
        check_values(arrays[spec.name], spec)
    return arrays


def _fitting(value: ArrayLike, spec: Tensor) -> NDArray[Any]:
    array = _as_array(value, spec)
    dtype = DTYPES.get(spec.datatype)
    if dtype is None:
        raise InvalidRequest(
            f"input {spec.name!r}: its type is {spec.datatype}, which this client cannot send"
        )
    if array.dtype == object:
        raise InvalidRequest(
            f"input {spec.name!r}: expected an array of numbers, found {_type_name(value)}, which "
            f"numpy makes Python objects of; convert it yourself, as by np.asarray(x, {dtype})"
        )
    if array.dtype.kind not in _MAY_BECOME[dtype.kind]:
        raise InvalidRequest(
            f"input {spec.name!r}: expected {_KINDS[dtype.kind]} for {spec.datatype}, "
            f"found {array.dtype}; convert them yourself, if that is what you mean"
        )
    wanted = spec.shape
    if array.ndim != len(wanted) or any(
        n not in (-1, m) for n, m in zip(wanted[1:], array.shape[1:], strict=True)
    ):
        remedy = "; one row is x[np.newaxis]" if array.ndim == len(wanted) - 1 else ""
        raise InvalidRequest(
            f"input {spec.name!r}: expected shape {list(wanted)} (-1 is any number), "
            f"found {list(array.shape)}{remedy}"
        )
    return array


def _as_array(value: ArrayLike, spec: Tensor) -> NDArray[Any]:
    """Make an array of what a caller gave.

    Raises:
        InvalidRequest: It cannot be made one. Conversion is the caller's own code (`__array__`),
            so it may fail in any way.
    """
    try:
        return np.asarray(value)
    except Exception as error:
        details = " ".join(str(error).split())[:_MAX_DETAILS] or type(error).__name__
        remedy = "pass numbers, or an array of them"
        if any(hasattr(each, "detach") for each in _first_elements(value)):  # a tensor of torch
            remedy = (
                "pass x.detach().cpu().numpy(), and x.float() in place of x if numpy has no such "
                "type"
            )
        raise InvalidRequest(
            f"input {spec.name!r}: expected an array, found {_type_name(value)}, which cannot be "
            f"made one: {details}; {remedy}"
        ) from error


def _first_elements(value: object) -> Iterator[object]:
    """Give a value, and what is first in it where it is a list or a tuple, and so on."""
    for _ in range(_MAX_DEPTH):
        yield value
        if not isinstance(value, list | tuple) or not value:
            return
        value = value[0]


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def converted(array: NDArray[Any], spec: Tensor) -> NDArray[Any]:
    """Give an array the type that it has on the wire.

    Args:
        array: One that `checked` has passed.
        spec: What it is for.

    Raises:
        InvalidRequest: A number has no place in that type.
    """
    dtype, source = DTYPES[spec.datatype], array.dtype
    counts_as_float = source.kind in "iu" and dtype.kind == "f"  # numpy calls int64 safe in float64
    if np.can_cast(source, dtype, "safe") and not counts_as_float:
        return np.ascontiguousarray(array, dtype)
    with np.errstate(over="ignore", under="ignore"):
        found = np.ascontiguousarray(array, dtype)
    low: float
    high: float
    if source.kind == "f":
        low, high = float(np.finfo(dtype).min), float(np.finfo(dtype).max)
        fits = bool((np.isinf(found) == np.isinf(array)).all())
    else:
        if dtype.kind == "f":
            high = 2 ** (np.finfo(dtype).nmant + 1)  # up to there it has every whole number
            low = -high
        else:
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        fits = not array.size or low <= int(array.min()) <= int(array.max()) <= high
    if not fits:
        raise InvalidRequest(
            f"input {spec.name!r}: expected numbers from {low} to {high} for {spec.datatype}, "
            f"found {np.nanmin(array)} to {np.nanmax(array)}"
        )
    return found


def count_nan_rows(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Count the rows that hold NaN in any input, some at a time: arrays may be larger than memory.

    Args:
        arrays: As `checked` has passed them.
    """
    floats = [array for array in arrays.values() if array.dtype.kind == "f"]
    found = 0
    for start in range(0, len(floats[0]) if floats else 0, _LOOKED_AT):
        marked = [
            np.isnan(part).any(axis=tuple(range(1, part.ndim)))
            for part in (array[start : start + _LOOKED_AT] for array in floats)
        ]
        found += int(np.logical_or.reduce(marked).sum())
    return found


def row_bytes(arrays: Mapping[str, NDArray[Any]], model: Model) -> int:
    """Count the bytes that a row of every input takes in a message."""
    return sum(
        DTYPES[spec.datatype].itemsize * math.prod(arrays[spec.name].shape[1:])
        for spec in model.inputs
    )


def make_request(
    model: Model,
    version: str,
    arrays: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
    *,
    details: bool,
) -> pb.ModelInferRequest:
    """Write a message.

    Args:
        model: Who is asked.
        version: Which version of it; empty for the newest.
        arrays: Some rows of every input, as `checked` has passed them.
        outputs: Those that are wanted; none means all of them.
        details: Whether the server is to tell how the answer came about.

    Raises:
        InvalidRequest: A number has no place in the input's type.
    """
    request = pb.ModelInferRequest(model_name=model.name, model_version=version)
    for spec in model.inputs:
        array = converted(arrays[spec.name], spec)
        request.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    if details:
        request.parameters[DETAILS].bool_param = True
    return request


def read_outputs(response: pb.ModelInferResponse) -> dict[str, NDArray[Any]]:
    """Read an answer's tensors, which share its memory.

    Raises:
        ServerFault: They are not what the answer says they are.
    """
    if len(response.raw_output_contents) != len(response.outputs):
        raise ServerFault(
            f"expected {len(response.outputs)} outputs as raw bytes, "
            f"found {len(response.raw_output_contents)}"
        )
    found = {}
    for tensor, content in zip(response.outputs, response.raw_output_contents, strict=True):
        dtype = DTYPES.get(tensor.datatype)
        size = math.prod(tensor.shape) * (dtype.itemsize if dtype else 0)
        if dtype is None or min(tensor.shape, default=0) < 0 or size != len(content):
            raise ServerFault(
                f"output {tensor.name!r}: expected {tensor.datatype} {list(tensor.shape)}, "
                f"found {len(content)} bytes"
            )
        found[tensor.name] = np.frombuffer(content, dtype).reshape(tensor.shape)
    return found


def read_details(response: pb.ModelInferResponse) -> dict[str, bool | int | float | str]:
    """Read what a server tells beside an answer."""
    found = {}
    for name, parameter in response.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None:
            found[name] = getattr(parameter, choice)
    return found


def _shown(values: Sequence[object]) -> str:
    return repr(values[:8])[:200] + (f" and {len(values) - 8} more" if len(values) > 8 else "")
