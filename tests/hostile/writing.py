"""Pickles, archives and safetensors files written byte by byte, as no honest program does."""

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

LEGACY = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # magic number
    b"\x80\x02M\xe9\x03."  # version of the protocol
    b"\x80\x02}q\x00."  # what machine
)
MARK, TUPLE, REDUCE, STOP = b"(", b"t", b"R", b"."


def text(value: str) -> bytes:
    """Push a string."""
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def whole(value: int) -> bytes:
    """Push a whole number."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def push(value: Any) -> bytes:
    """Push what may be pushed without a call; bytes are opcodes already."""
    match value:
        case bytes():
            return value
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return whole(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return text(value)
        case tuple():
            return MARK + b"".join(map(push, value)) + TUPLE
        case list():
            return b"](" + b"".join(map(push, value)) + b"e"
        case dict():
            pairs = (push(key) + push(inner) for key, inner in value.items())
            return b"}(" + b"".join(pairs) + b"u"
    raise TypeError(type(value))


def named(name: str) -> bytes:
    """Push what a qualified name stands for."""
    module, _, own = name.rpartition(".")
    return b"c" + f"{module}\n{own}\n".encode("utf-8", "surrogatepass")


def call(name: str, *given: Any) -> bytes:
    """Call a function or class."""
    return named(name) + push(given) + REDUCE


def put(index: int) -> bytes:
    """Note the topmost value under a number."""
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    """Push a value that was noted."""
    return b"j" + struct.pack("<I", index)


def storage(numbers: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """Push a storage."""
    return push(("storage", named(f"torch.{kind}"), key, "cpu", numbers)) + b"Q"


def legacy_storage(numbers: int, key: str = "0") -> bytes:
    """Push a storage in the format from before 1.6."""
    return push(("storage", named("torch.FloatStorage"), key, "cpu", numbers, None)) + b"Q"


def tensor(
    size: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
    *,
    of: bytes | None = None,
    offset: int = 0,
) -> bytes:
    """Push a tensor of float32; of a storage that holds it unless another is given."""
    count = 1
    strides = []
    for length in reversed(size):
        strides.append(count)
        count *= length
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage(count) if of is None else of,
        offset,
        size,
        tuple(reversed(strides)) if stride is None else stride,
        False,
        call("collections.OrderedDict"),
    )


def pickled(value: Any) -> bytes:
    """A pickle of one value."""
    return b"\x80\x02" + push(value) + STOP


def legacy(value: Any, keys: Any = (), numbers: bytes = b"") -> bytes:
    """A file in the format from before 1.6."""
    return LEGACY + pickled(value) + pickled(list(keys)) + numbers


def archive(
    pickle: bytes,
    records: Mapping[str, bytes] | None = None,
    *,
    root: str = "archive",
    compression: int = zipfile.ZIP_STORED,
    numbers: int = 64,
) -> bytes:
    """An archive as torch.save writes it, with a storage 0 of so many float32 zeros."""
    entries = {"data.pkl": pickle, "byteorder": b"little", "data/0": bytes(4 * numbers)}
    entries |= {"version": b"3\n", ".data/serialization_id": b"0"} | dict(records or {})
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        for name, inner in entries.items():
            file.writestr(f"{root}/{name}", inner)
    return content.getvalue()


def safetensors(header: Any, numbers: bytes = b"") -> bytes:
    """A safetensors file with a header of any kind."""
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + numbers


def layer(stem: str = "layers.0.", inputs: int = 2, outputs: int = 2) -> dict[str, bytes]:
    """Tensors of a KANLinear, each over the same zeros."""
    return {
        f"{stem}base_weight": tensor((outputs, inputs), of=storage(64)),
        f"{stem}spline_weight": tensor((outputs, inputs, 8), of=storage(64)),
        f"{stem}grid": tensor((inputs, 12), of=storage(64)),
    }
