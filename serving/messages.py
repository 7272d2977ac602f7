"""Messages from their bytes, within a bound on what they take once they are inflated.

gRPC inflates a compressed message whole before it compares its size with any limit, so that two
megabytes of gzip would take two gigabytes. With `AS_SENT` it hands compressed messages on as they
were sent, and they are inflated here, as far as the limit.
"""

import zlib
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from protos import inference_pb2 as pb
from serving.errors import InvalidRequest, TooLarge

AS_SENT = ("grpc.per_message_decompression", 0)
"""gRPC's option of a server that does not inflate messages."""

SMALL_BYTES = 2**16
"""Limit for messages without tensors."""

PROBE_BYTES = 2**10
"""Limit for messages of those who need not be known, which are read in gRPC's own thread."""

_PART_BYTES = 2**12  # a smaller message is parsed in no time, whatever it holds
_MOST_PARTS = 2**13
_SHAPE, _SHAPE_BYTES = 3, 2**10  # a field of an input
_VARINT_BITS = 70
_FIXED = {1: 8, 5: 4}  # bytes of a wire type
# Fields of a ModelInferRequest that hold fields: parameters, inputs with contents, outputs.
_PARTS: "Inner" = {4: {}, 5: {4: {}, 5: {}}, 6: {2: {}}}
_EITHER_FORM = 32 + zlib.MAX_WBITS  # gzip and zlib, which zlib tells apart

Inner = dict[int, "Inner"]
Kind = TypeVar("Kind", bound=Message)


def is_compressed(content: bytes) -> bool:
    """Whether a message was compressed by its sender.

    The header that says so does not come through, but the bytes tell: none of the protocol's
    messages begins as gzip does (RFC 1952: 1f 8b) or as zlib does (RFC 1950: a byte that ends in 8,
    and both as one number a multiple of 31), which would be fields that it does not have.
    """
    start = content[:2]
    return start == b"\x1f\x8b" or (
        len(start) == 2 and start[0] & 0x8F == 0x08 and int.from_bytes(start, "big") % 31 == 0
    )


def inflate(content: bytes, limit: int) -> bytes:
    """Inflate a message, if it was compressed.

    Args:
        content: As it was sent.
        limit: Bytes that it may have, compressed or not.

    Raises:
        TooLarge: It has more.
        InvalidRequest: It cannot be inflated.
    """
    if is_compressed(content):
        content = _inflated(content, limit)
    if len(content) > limit:
        raise TooLarge(f"expected a message of at most {limit} bytes, found a larger one")
    return content


def _inflated(content: bytes, limit: int) -> bytes:
    """Inflate as far as a limit, part by part.

    What is compressed is smaller than what it holds, but for a few bytes. Blocks that hold nothing
    would take a second of the processor for every megabyte.
    """
    inflater = zlib.decompressobj(_EITHER_FORM)
    parts, size = [], 0
    step = min(limit, _PART_BYTES)
    for start in range(0, min(len(content), limit + step), step):
        try:
            parts.append(inflater.decompress(content[start : start + step], limit + 1 - size))
        except zlib.error as error:
            raise InvalidRequest(_NOT_WHOLE) from error
        size += len(parts[-1])
        if size > limit:
            break
        if size + step < start:
            raise InvalidRequest(_NOT_WHOLE)
        if inflater.eof:
            if inflater.unused_data or start + step < len(content):
                raise InvalidRequest(_NOT_WHOLE)
            break
    if size <= limit and not inflater.eof:
        raise InvalidRequest(_NOT_WHOLE)
    return b"".join(parts)


def require_few_parts(content: bytes) -> None:
    """Refuse a request of many small parts, which takes fifty times its bytes once it is parsed.

    Args:
        content: A ModelInferRequest.

    Raises:
        InvalidRequest: It has more than a few thousand parts.
    """
    left = _MOST_PARTS
    open_ends = [(0, len(content), _PARTS)]
    while open_ends:
        place, end, inner = open_ends.pop()
        while place < end:
            left -= 1
            if left < 0:
                raise InvalidRequest(
                    f"expected a request of at most {_MOST_PARTS} parts, found more; send tensors "
                    "as raw bytes, or typed contents packed"
                )
            tag, place = _number(content, place)
            if tag & 7 == 2:  # a length, and so many bytes
                size, place = _number(content, place)
                if inner is _PARTS[5] and tag >> 3 == _SHAPE and size > _SHAPE_BYTES:
                    raise InvalidRequest("expected a shape of a few sizes, found thousands")
                if tag >> 3 in inner:
                    open_ends.append((place, min(place + size, end), inner[tag >> 3]))
                place += size
            elif tag & 7 == 0:
                _, place = _number(content, place)
            elif tag & 7 in _FIXED:
                place += _FIXED[tag & 7]
            else:
                return  # no message, as the parser will say


def _number(content: bytes, place: int) -> tuple[int, int]:
    """Read a varint; give it and the place behind it. Behind the end there are zeros."""
    found = shift = 0
    while place < len(content) and shift < _VARINT_BITS:
        byte = content[place]
        place += 1
        found |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return found, place


def parse(kind: type[Kind], content: bytes, limit: int) -> Kind:
    """Read a message from its bytes.

    Args:
        kind: Which message.
        content: As it was sent.
        limit: Bytes that it may have once it is inflated.

    Raises:
        TooLarge: It has more.
        InvalidRequest: It cannot be inflated, or is no such message.
    """
    return parse_inflated(kind, inflate(content, limit))


def parse_inflated(kind: type[Kind], content: bytes) -> Kind:
    """Read a message from its bytes once they are inflated.

    Raises:
        InvalidRequest: It is no such message.
    """
    try:
        if kind is pb.ModelInferRequest and len(content) > _PART_BYTES:
            require_few_parts(content)
        return kind.FromString(content)
    except DecodeError as error:
        name = kind.DESCRIPTOR.full_name
        raise InvalidRequest(f"expected {name}, found no such message") from error


_NOT_WHOLE = "expected a message compressed by gzip or deflate, found one that cannot be inflated"
