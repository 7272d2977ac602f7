"""Messages from their bytes, within a bound on what they take once they are inflated.

gRPC inflates a compressed message whole before it compares its size with any limit, so that two
megabytes of gzip would take two gigabytes. With `AS_SENT` it hands compressed messages on as they
were sent, and they are inflated here, as far as the limit.
"""

import zlib
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from serving.errors import InvalidRequest, TooLarge

AS_SENT = ("grpc.per_message_decompression", 0)
"""gRPC's option of a server that does not inflate messages."""

SMALL_BYTES = 2**16
"""Limit for messages without tensors."""

_EITHER_FORM = 32 + zlib.MAX_WBITS  # gzip and zlib, which zlib tells apart

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
        inflater = zlib.decompressobj(_EITHER_FORM)
        try:
            content = inflater.decompress(content, limit + 1)
        except zlib.error as error:
            raise InvalidRequest(_NOT_WHOLE) from error
        if len(content) <= limit and (not inflater.eof or inflater.unused_data):
            raise InvalidRequest(_NOT_WHOLE)
    if len(content) > limit:
        raise TooLarge(f"expected a message of at most {limit} bytes, found a larger one")
    return content


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
    try:
        return kind.FromString(inflate(content, limit))
    except DecodeError as error:
        name = kind.DESCRIPTOR.full_name
        raise InvalidRequest(f"expected {name}, found no such message") from error


_NOT_WHOLE = "expected a message compressed by gzip or deflate, found one that cannot be inflated"
