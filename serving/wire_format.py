"""ModelInferRequest and ModelInferResponse by their bytes, where protobuf would copy the tensors.

Field numbers are those of protos/inference.proto, the encoding is protobuf's
(https://protobuf.dev/programming-guides/encoding/). Whatever is not plain is left to protobuf.
"""

from collections.abc import Sequence
from typing import NamedTuple

_LENGTH_DELIMITED = 2


def _tag(number: int) -> int:
    return number << 3 | _LENGTH_DELIMITED


# Of a request: model_name, model_version, parameters, inputs, outputs; then id and tensors.
_IN_HEADER = frozenset(_tag(number) for number in (1, 2, 4, 5, 6))
_ID, _TENSOR = _tag(3), _tag(7)
_TENSOR_OF_RESPONSE = bytes([_tag(6)])
_MOST_FIELDS = 16
_MOST_HEADER_BYTES = 2**10
_MOST_LENGTH_BYTES = 5
_MOST_SIZES = 256


class Parts(NamedTuple):
    """A request, taken apart.

    Args:
        header: The message without its id and its tensors: itself a message.
        id: Of the request.
        tensors: Where each of `raw_input_contents` begins, and its size in bytes.
    """

    header: bytes
    id: str
    tensors: Sequence[tuple[int, int]]


def split_request(content: bytes) -> Parts | None:
    """Take a ModelInferRequest apart, without a copy of its tensors.

    Returns:
        Its parts; None if it has a long header, many fields, or one that is unknown or damaged.
    """
    size = len(content)
    before, parts = _last_of_size.get(size, _NOTHING)
    if parts is not None and content.startswith(before):
        return parts
    header: list[bytes] = []
    tensors: list[tuple[int, int]] = []
    request_id = ""
    start = place = 0  # of what belongs to the header, and of the next field
    try:
        for _ in range(_MOST_FIELDS):
            if place == size:
                break
            tag, length, begin = content[place], content[place + 1], place + 2
            if length >= 0x80:
                length, begin = _length(content, begin - 1)
            end = begin + length
            if end > size:
                return None
            if tag == _TENSOR:
                tensors.append((begin, length))
            elif tag == _ID:
                request_id = content[begin:end].decode()
            elif tag in _IN_HEADER:
                place = end
                continue
            else:
                return None
            header.append(content[start:place])
            start = place = end
        else:
            return None
    except (IndexError, UnicodeDecodeError):
        return None
    if size - sum([length for _, length in tensors]) > _MOST_HEADER_BYTES:
        return None
    header.append(content[start:])
    parts = Parts(b"".join(header), request_id, tensors)
    if len(tensors) == 1 and tensors[0][0] + tensors[0][1] == size and not request_id:
        if len(_last_of_size) >= _MOST_SIZES:
            _last_of_size.clear()
        _last_of_size[size] = content[: tensors[0][0]], parts
    return parts


_last_of_size: dict[int, tuple[bytes, Parts | None]] = {}
"""Of the last request of a size that ends with its only tensor: what goes before that, and its
parts. The next one is mostly of the same client, and differs in the tensor alone."""
_NOTHING: tuple[bytes, Parts | None] = (b"", None)


def _length(content: bytes, place: int) -> tuple[int, int]:
    """Read a length; return it and the place behind it.

    Raises:
        IndexError: It is cut off, or longer than any length.
    """
    found = 0
    for i in range(_MOST_LENGTH_BYTES):
        byte = content[place + i]
        found |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return found, place + i + 1
    raise IndexError("a length has more bytes than any")


def tensor_prefix(size: int) -> bytes:
    """Return what goes before a tensor of so many bytes in a ModelInferResponse."""
    length = bytearray()
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return _TENSOR_OF_RESPONSE + bytes(length) + bytes([size])
