"""A model file without its weights, as small as what is asked of it.

A file is mostly weights, and protobuf copies every byte of a file that it parses, holding the
interpreter's lock meanwhile. So the file is first gone over field by field, in Python, which lets
requests in between; only the fields that `onnx_graph.proto` names are copied, and protobuf parses
those alone.

What is left out is left out whole and what is kept stays in its order, so a message that stands
twice is merged as in the file. What onnxruntime's own parser could read in another way than this
is refused. This module knows the encoding, and nothing of what a graph may hold.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import repeat
from typing import cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from kan_bundle.errors import GraphError
from kan_bundle.layout import MODEL_FILE
from protos.onnx_graph_pb2 import ModelProto

_DEEPEST = 64  # messages in messages; a branch in a branch takes three. protobuf ends at 100
_MOST_FIELDS = 4_000_000  # some seconds; a hundred thousand nodes have half as many
_LONGEST = 2**16  # bytes of a name

_MODEL = cast(Descriptor, ModelProto.DESCRIPTOR)
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}  # bytes by wire type


def read_outline(content: bytes) -> ModelProto:
    """Parse what `onnx_graph.proto` names of a model file.

    Args:
        content: The file.

    Raises:
        GraphError: It is no such file, or too much of one.
    """
    if content[4:8] == b"ORTM":
        raise GraphError(
            f"{MODEL_FILE}: expected an ONNX model, found one in onnxruntime's own format, of "
            "which nothing is checked; export again"
        )
    model = ModelProto()
    budget = repeat(None, _MOST_FIELDS)
    try:
        outline = _outline(content, 0, len(content), _MODEL, 1, budget)
        model.ParseFromString(outline)
    except DecodeError as error:
        raise _no_model("bytes that are none") from error
    if not model.HasField("graph"):
        raise _no_model("one without a graph")
    return model


def _outline(
    content: bytes, at: int, end: int, kind: Descriptor, depth: int, budget: Iterator[None]
) -> bytes:
    """Copy one message without the fields that its declaration does not name.

    Args:
        content: The file.
        at: Where the message begins.
        end: And ends.
        kind: Its declaration.
        depth: How many messages it is in, itself included.
        budget: Has one item for each field that may yet come.
    """
    if depth > _DEEPEST:
        raise GraphError(
            f"{MODEL_FILE}: expected at most {_DEEPEST} messages in one another, found more; "
            "export a network with fewer branches inside branches"
        )
    named = _named(kind)
    kept: list[bytes] = []
    while at < end:
        if next(budget, budget) is budget:
            raise GraphError(
                f"{MODEL_FILE}: expected at most {_MOST_FIELDS} fields, found more; export a "
                "smaller network"
            )
        start = at
        tag, at = _varint(content, at, end)
        number, form = tag >> 3, tag & 7
        inside = at
        if form == _BYTES:
            size, inside = _varint(content, at, end)
            at = inside + size
        elif form == _VARINT:
            _, at = _varint(content, at, end)
        elif form in _FIXED:
            at += _FIXED[form]
        else:
            raise _no_model(f"wire type {form} at byte {start}")
        if at > end or not 0 < number < 2**29:
            raise _no_model(f"a field {number} that ends at byte {at} of {end}")
        if number not in named:
            continue
        inner = named[number]
        if inner is None:
            if at - start > _LONGEST:
                raise GraphError(
                    f"{MODEL_FILE}: expected names of at most {_LONGEST} bytes, found one of "
                    f"{at - start}; export again"
                )
            kept.append(content[start:at])
        elif form == _BYTES:
            message = _outline(content, inside, at, inner, depth + 1, budget)
            kept += (_encoded(tag), _encoded(len(message)), message)
    return b"".join(kept)


@cache
def _named(kind: Descriptor) -> Mapping[int, Descriptor | None]:
    """Give the fields of a declaration by number, each with the declaration of what is in it."""
    return {field.number: field.message_type for field in kind.fields}


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    """Decode a number; returns it and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _no_model(f"a number without an end at byte {at}")


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _no_model(found: str) -> GraphError:
    return GraphError(f"{MODEL_FILE}: expected an ONNX model, found {found}; export again")
