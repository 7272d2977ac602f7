"""Tensors on the wire to numpy arrays, and back.

The rules are the Open Inference Protocol's: either every input is raw bytes in
`raw_input_contents`, one entry per input in the same order, or every input is typed `contents`;
never both. The answer comes in the form the question had. Everything is checked here, before
anything is run, so that a bad request cannot reach its neighbours.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kan_bundle.manifest import DATATYPES, Datatype, TensorSpec
from protos.inference_pb2 import InferTensorContents, ModelInferRequest, ModelInferResponse
from serving.errors import InvalidRequest
from serving.parameters import refuse_parameters

WIRE_TYPES: dict[Datatype, np.dtype[Any]] = {
    name: np.dtype(dtype).newbyteorder("<") for name, dtype in DATATYPES.items()
}
"""How numbers are sent."""

_CONTENTS_FIELD: dict[Datatype, str] = {
    "FP32": "fp32_contents",
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "UINT8": "uint_contents",
    "BOOL": "bool_contents",
}
_MOST_SHOWN = 64


def decode_inputs(request: ModelInferRequest, expected: Sequence[TensorSpec]) -> list[NDArray[Any]]:
    """Read a request's tensors.

    Args:
        request: As received.
        expected: The model's inputs.

    Returns:
        One array per input, in the order of `expected`. It may share the request's memory.

    Raises:
        InvalidRequest: A tensor is missing, unknown, given twice, or of another type, shape or
            size than the model takes.
        NotOffered: It is to be had from elsewhere.
    """
    tensors = request.inputs
    names = [tensor.name for tensor in tensors]
    wanted = [spec.name for spec in expected]
    if names != wanted and sorted(names) != sorted(wanted):
        raise InvalidRequest(f"expected inputs {wanted}, found {_shown(names)}")
    raw = request.raw_input_contents
    if raw and len(raw) != len(names):
        raise InvalidRequest(
            f"expected {len(names)} raw_input_contents, one per input, found {len(raw)}"
        )
    arrays: list[NDArray[Any]] = []
    for spec in expected:
        place = names.index(spec.name)
        tensor = tensors[place]
        shape = _checked_shape(tensor, spec, raw[place] if raw else None)
        if not raw:
            arrays.append(_from_contents(tensor.contents, shape, spec))
        elif tensor.HasField("contents"):
            raise InvalidRequest(
                "expected either raw_input_contents or contents, found both in one request"
            )
        else:
            arrays.append(_from_raw(raw[place], shape, spec))
        if len(arrays[-1]) != len(arrays[0]):
            rows = {len(array) for array in arrays}
            raise InvalidRequest(f"expected the same number of rows in every input, found {rows}")
    return arrays


def choose_outputs(request: ModelInferRequest, offered: Sequence[TensorSpec]) -> list[int]:
    """Find which outputs a request asks for.

    Args:
        request: As received.
        offered: The model's outputs.

    Returns:
        Indices into `offered`, in the order asked for; all of them if none is named.

    Raises:
        InvalidRequest: An output is unknown or named twice.
        NotOffered: It is to be delivered in another way.
    """
    if not request.outputs:
        return list(range(len(offered)))
    names = [output.name for output in request.outputs]
    known = [spec.name for spec in offered]
    if len(set(names)) != len(names) or not set(names) <= set(known):
        raise InvalidRequest(f"expected outputs from {known}, each once, found {_shown(names)}")
    for output in request.outputs:
        refuse_parameters("output", output.parameters)
    return [known.index(name) for name in names]


def encode_outputs(
    response: ModelInferResponse,
    offered: Sequence[TensorSpec],
    chosen: Sequence[int],
    arrays: Sequence[NDArray[Any]],
    *,
    is_typed: bool,
) -> None:
    """Write outputs into a response.

    Args:
        response: Filled in.
        offered: The model's outputs.
        chosen: Which of them to write, as indices.
        arrays: The values of all of them.
        is_typed: Whether as typed contents, which is how the request came.
    """
    for index in chosen:
        spec, array = offered[index], arrays[index]
        tensor = response.outputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        if is_typed:
            getattr(tensor.contents, _CONTENTS_FIELD[spec.datatype]).extend(array.ravel().tolist())
        else:
            little_endian = array.astype(WIRE_TYPES[spec.datatype], copy=False)
            response.raw_output_contents.append(little_endian.tobytes())


def row_bytes(spec: TensorSpec) -> int:
    """Count the bytes that one row of a tensor takes on the wire."""
    return WIRE_TYPES[spec.datatype].itemsize * math.prod(spec.shape[1:])


def _checked_shape(
    tensor: ModelInferRequest.InferInputTensor, spec: TensorSpec, raw: bytes | None
) -> tuple[int, ...]:
    """Check the type and the shape of a tensor.

    Args:
        tensor: As received.
        spec: What the model takes.
        raw: Its bytes; None if it has typed contents.
    """
    refuse_parameters("input", tensor.parameters)
    if tensor.datatype != spec.datatype:
        raise InvalidRequest(
            f"input {spec.name!r}: expected datatype {spec.datatype}, "
            f"found {tensor.datatype[:_MOST_SHOWN]!r}"
        )
    shape = tuple(tensor.shape)
    if not shape or shape[0] < 0 or shape[1:] != spec.shape[1:]:  # the first one is the rows
        raise InvalidRequest(
            f"input {spec.name!r}: expected shape {list(spec.shape)} (-1 is any number of rows), "
            f"found {_shown(list(shape))}{_shape_remedy(tensor, spec, raw)}"
        )
    return shape


def _shape_remedy(
    tensor: ModelInferRequest.InferInputTensor, spec: TensorSpec, raw: bytes | None
) -> str:
    """Say which shape to send, if it can be known what was meant."""
    shape, row_shape = tuple(tensor.shape), spec.shape[1:]
    if shape == row_shape and shape:
        return f"; one row is sent with shape {[1, *row_shape]}"
    if min(shape, default=0) >= 0 or len(shape) != len(spec.shape):
        return ""
    if any(0 <= size != wanted for size, wanted in zip(shape[1:], row_shape, strict=True)):
        return ""
    rows = shape[0]
    if rows < 0:
        if raw is None:
            numbers = len(getattr(tensor.contents, _CONTENTS_FIELD[spec.datatype]))
            rows, rest = divmod(numbers, max(1, math.prod(row_shape)))
        else:
            rows, rest = divmod(len(raw), max(1, row_bytes(spec)))
        if rest or not rows:
            return "; a request says how many rows it has, in place of -1"
    return f"; a request says every size: send {[rows, *row_shape]}"


def _from_raw(content: bytes, shape: tuple[int, ...], spec: TensorSpec) -> NDArray[Any]:
    dtype = WIRE_TYPES[spec.datatype]
    size = math.prod(shape) * dtype.itemsize  # Python's integers do not overflow
    if len(content) != size:
        raise InvalidRequest(
            f"input {spec.name!r}: shape {list(shape)} of {spec.datatype} is {size} bytes, "
            f"found {len(content)} in raw_input_contents"
        )
    array: NDArray[Any] = np.frombuffer(content, dtype=dtype).reshape(shape)
    if spec.datatype == "BOOL" and bool((array.view(np.uint8) > 1).any()):
        raise InvalidRequest(f"input {spec.name!r}: expected bytes of 0 or 1 for BOOL")
    return array


def _from_contents(
    contents: InferTensorContents, shape: tuple[int, ...], spec: TensorSpec
) -> NDArray[Any]:
    field = _CONTENTS_FIELD[spec.datatype]
    strays = [found.name for found, _ in contents.ListFields() if found.name != field]
    if strays:
        raise InvalidRequest(
            f"input {spec.name!r}: {spec.datatype} belongs in contents.{field}, found {strays}"
        )
    values = getattr(contents, field)
    if len(values) != math.prod(shape):
        raise InvalidRequest(
            f"input {spec.name!r}: shape {list(shape)} is {math.prod(shape)} elements, found "
            f"{len(values)} in contents.{field}"
        )
    try:
        array: NDArray[Any] = np.array(values, dtype=DATATYPES[spec.datatype]).reshape(shape)
    except OverflowError as error:
        raise InvalidRequest(
            f"input {spec.name!r}: expected numbers in the range of {spec.datatype}, found others"
        ) from error
    return array


def _shown(values: Sequence[object]) -> str:
    """Show a client its own values, but never more than a line of them."""
    text = repr(list(values[:8]))[: 4 * _MOST_SHOWN]
    return text + (f" and {len(values) - 8} more" if len(values) > 8 else "")
