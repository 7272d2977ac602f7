"""What the pickles of torch.save may call, and what each call takes.

torch lets a file call some thirty functions and classes of its own. Each has a rule here: what its
arguments must be so that what it allocates, copies or hashes is bounded by the file. What has no
rule is not called. Values are notes of what they would be; nothing is built.
"""

import math
import re
from collections.abc import Callable, Collection
from typing import Any

import torch

from kan_model.archives import MOST_NAMES
from kan_model.pickle_values import (
    EMPTY,
    MOST_NUMBERS,
    Group,
    Long,
    Made,
    Name,
    Refused,
    StorageNote,
    TorchRefuses,
    as_tuple,
    is_tuple,
)

_MOST_COPIED = 1_000_000  # values that calls copy
_MOST_TEXT = 2**26  # bytes that calls copy
_MOST_LOOKUPS = 10_000_000  # torch compares each call with every class that is let through
_MOST_ODD_KEYS = 10_000  # their hashes can be made to collide, so each may cost as much as all
_MOST_IN_KEY = 1_000
_MOST_DIMENSIONS = 64  # as in torch
_SLACK = 2**24  # bytes
_ENCODINGS = ("latin1", "latin-1", "utf-8", "utf8", "ascii")
ITEM_BYTES = {
    f"torch.{kind}Storage": size
    for size, kinds in (
        (1, ("Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4")),
        (2, ("Half", "BFloat16", "Short")),
        (4, ("Float", "Int", "QInt32")),
        (8, ("Double", "Long", "ComplexFloat")),
        (16, ("ComplexDouble",)),
    )
    for kind in kinds
} | {"torch.storage.UntypedStorage": 1}
_TORCHS_OWN = ("torch._", "torch.storage.", "torch.cuda.", *ITEM_BYTES)
_TENSOR_CLASS = re.compile(r"torch\.(?:cuda\.|sparse\.|cuda\.sparse\.)?[A-Za-z0-9]*Tensor")


class Calls:
    """Notes what calls return, and counts what they take.

    Args:
        stand_ins: Names of classes and functions that inert stand-ins answer.
        file_size: Bytes of the file.
    """

    def __init__(self, stand_ins: Collection[str], file_size: int) -> None:
        self.stand_ins = stand_ins
        self._most_claimed = 4 * file_size + _SLACK
        self._copied = self._text = self._tensor_bytes = 0
        self._tensors = self._lookups = self._odd_keys = 0

    def look_up(self, name: str) -> None:
        """Count what torch does to find what a name stands for."""
        if name in self.stand_ins:
            self._lookups += len(self.stand_ins)
            if self._lookups > _MOST_LOOKUPS:
                raise Refused(
                    f"calls {len(self.stand_ins):,} classes of its own too many times over"
                )

    def check_key(self, key: object) -> None:
        """Refuse a key if its hash is slow to compute or to compare."""
        if isinstance(key, str | Long | float | bool | None | Name) or (
            isinstance(key, int) and -MOST_NUMBERS < key < MOST_NUMBERS
        ):
            return
        self._odd_keys += 1
        too_heavy = isinstance(key, Group) and key.weight > _MOST_IN_KEY
        if isinstance(key, int) or too_heavy or self._odd_keys > _MOST_ODD_KEYS:
            raise Refused("has keys of dicts or sets that take long to compare")

    def call(self, called: object, arguments: object) -> Any:
        """Note what a call returns.

        Raises:
            TorchRefuses: torch calls no such thing.
            Refused: It would take more than it may.
        """
        if not isinstance(called, Name):
            raise TorchRefuses("an object is called")
        if not is_tuple(arguments):
            raise Refused(f"calls {called.text} with arguments that are no tuple")
        given = arguments.items
        rule = _CALLS.get(called.text)
        if rule is not None:
            try:
                return rule(self, *given)
            except TypeError as error:
                raise Refused(f"calls {called.text} with {len(given)} arguments") from error
        if called.text in self.stand_ins:
            self.look_up(called.text)
            return Made(called.text)
        if _TENSOR_CLASS.fullmatch(called.text) and not given:
            return self._tensor(0)
        if not called.text.startswith(_TORCHS_OWN):
            raise TorchRefuses(f"{called.text} is called")
        raise Refused(f"calls {called.text} in a way that torch.save does not write")

    def copy(self, values: object) -> None:
        """Count what a call copies."""
        if isinstance(values, Group):
            self._copied += values.count
        elif isinstance(values, Made | Long):
            self._text += values.size
        elif isinstance(values, str):
            self._text += len(values)
        if self._copied > _MOST_COPIED or self._text > _MOST_TEXT:
            raise Refused("copies its parts too many times over")

    def copied_group(self, values: object) -> Group:
        """Count what a call copies of a tuple, list, dict or set."""
        if not isinstance(values, Group):
            raise Refused("copies what is no tuple, list, dict or set")
        self.copy(values)
        return values

    def _ordered_dict(self, pairs: object = EMPTY) -> Group:
        found = self.copied_group(pairs)
        for pair in found.items:
            if isinstance(pair, Group) and pair.items:
                self.check_key(pair.items[0])
            else:
                self.check_key(pair)  # of a Counter
        return Group("OrderedDict", count=found.count)

    def _set(self, values: object = EMPTY) -> Group:
        found = self.copied_group(values)
        for value in found.items:
            self.check_key(value)
        return Group("set", count=found.count)

    def _size(self, sizes: object = EMPTY) -> Group:
        return as_tuple(list(self.copied_group(sizes).items))

    def _encode(self, text: object, encoding: object = "utf-8") -> Made:
        if encoding not in _ENCODINGS or not isinstance(text, str | Long):
            raise Refused("encodes text in a way that torch.save does not")
        self.copy(text)
        return Made("bytes", text.size if isinstance(text, Long) else len(text))

    def _bytearray(self, content: object = "", encoding: object = "latin-1") -> Made:
        is_bytes = isinstance(content, Made) and content.name == "bytes"  # a tensor is a number
        if not (is_bytes or isinstance(content, str | Long)) or encoding not in _ENCODINGS:
            raise Refused("makes an array of bytes from something other than bytes")
        self.copy(content)
        return Made("bytearray")

    def _complex(self, *parts: object) -> Made:
        if not all(isinstance(part, int | float) for part in parts):
            raise Refused("makes a complex number from something other than numbers")
        return Made("complex")

    def _named(self, *parts: object) -> Made:
        """Make a device or a layout."""
        if not all(isinstance(part, int | str) for part in parts):
            raise Refused("names a device or a layout by something other than a name")
        return Made("constant")

    def _tensor(self, size: int) -> Made:
        self._tensors += 1
        if self._tensors > MOST_NAMES:
            raise Refused(f"holds more than {MOST_NAMES:,} tensors")
        return Made("tensor", size)

    def view(self, storage: object, item: int, offset: object, size: object, stride: object) -> int:
        """Check that a tensor lies in its storage.

        Returns:
            Bytes that it claims.
        """
        sizes, strides = _whole_numbers(size), _whole_numbers(stride)
        if not isinstance(storage, StorageNote) or not isinstance(offset, int) or offset < 0:
            raise Refused("makes a tensor of what is no storage")
        if len(sizes) != len(strides):
            raise Refused("makes a tensor with other strides than sizes")
        last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if 0 not in sizes and (last + 1) * item > storage.size:
            raise Refused(
                f"has a tensor of shape {tuple(sizes)} that reaches beyond its storage of "
                f"{storage.size:,} bytes"
            )
        if offset * item > storage.size:
            raise Refused("has a tensor that begins beyond its storage")
        return math.prod(sizes) * item

    def _rebuild(
        self, storage: object, offset: object, size: object, stride: object, *rest: object
    ) -> Made:
        item = storage.item if isinstance(storage, StorageNote) else 1
        return self._tensor(self.view(storage, item, offset, size, stride))

    def _rebuild_v3(
        self,
        storage: object,
        offset: object,
        size: object,
        stride: object,
        needs_gradient: object,
        hooks: object,
        dtype: object,
        *rest: object,
    ) -> Made:
        return self._tensor(self.view(storage, _item_bytes(dtype), offset, size, stride))

    def _rebuild_quantized(
        self,
        storage: object,
        offset: object,
        size: object,
        stride: object,
        parameters: object,
        *rest: object,
    ) -> Made:
        made = self._rebuild(storage, offset, size, stride)
        if isinstance(storage, StorageNote) and made.size > storage.size:  # it is allocated
            raise Refused(f"has a quantized tensor that claims {made.size:,} bytes")
        if isinstance(parameters, Group):
            for part in parameters.items:
                self.copy(part)
        return made

    def _rebuild_parameter(self, tensor: object, *rest: object) -> Made:
        if not isinstance(tensor, Made) or tensor.name != "tensor":
            raise Refused("makes a parameter of what is no tensor")
        for state in rest[2:]:
            self._copy_state(state)
        return self._tensor(tensor.size)

    def _parameter(self, *given: object) -> Made:
        return self._rebuild_parameter(*given) if given else self._tensor(0)

    def _rebuild_typed(self, called: object, kind: object, arguments: object, state: object) -> Any:
        self._copy_state(state)
        return self.call(called, arguments)

    def _copy_state(self, state: object) -> None:
        for part in state.items if is_tuple(state) else [state]:
            self.copy(part)

    def _rebuild_sparse(self, layout: object, data: object) -> Made:
        for part in data.items if is_tuple(data) else ():
            if is_tuple(part):
                _whole_numbers(part)
        return self._tensor(0)

    def _rebuild_meta(
        self, dtype: object, size: object, stride: object, needs_gradient: object
    ) -> Made:
        _whole_numbers(size)
        _whole_numbers(stride)
        return self._tensor(0)

    def _rebuild_nested(self, *tensors: object) -> Made:
        if not all(isinstance(tensor, Made) for tensor in tensors):
            raise Refused("makes a nested tensor of what is no tensor")
        return self._tensor(0)

    def _rebuild_on_device(
        self, tensor: object, dtype: object, device: object, needs_gradient: object
    ) -> Made:
        if not isinstance(tensor, Made) or tensor.name != "tensor":
            raise Refused("copies what is no tensor")
        size = 16 * tensor.size  # of the smallest numbers to the largest
        self._tensor_bytes += size
        if self._tensor_bytes > self._most_claimed:
            raise Refused("copies tensors too many times over")
        return self._tensor(size)


def _whole_numbers(sizes: object) -> list[int]:
    found = sizes.items if isinstance(sizes, Group) else None
    if found is None or len(found) > _MOST_DIMENSIONS:
        raise Refused(f"has a tensor of more than {_MOST_DIMENSIONS} dimensions, or of none")
    if not all(isinstance(n, int) and n >= 0 for n in found):
        raise Refused("has a tensor with sizes or strides that are no numbers")
    if math.prod(max(n, 1) for n in found) >= MOST_NUMBERS:
        raise Refused("has a tensor that claims more than 2**62 numbers")
    return list(found)


def _item_bytes(dtype: object) -> int:
    found = getattr(torch, dtype.text.rpartition(".")[2], None) if isinstance(dtype, Name) else 0
    if not isinstance(found, torch.dtype):
        raise Refused("makes a tensor of an unknown type")
    return found.itemsize


def shown_number(number: int) -> str:
    """Show a number that may have thousands of digits."""
    return f"{number:,}" if abs(number) < MOST_NUMBERS else "more than 2**62"


_REBUILDS: dict[str, Callable[..., Any]] = {
    "tensor": Calls._rebuild,
    "tensor_v2": Calls._rebuild,
    "tensor_v3": Calls._rebuild_v3,
    "qtensor": Calls._rebuild_quantized,
    "parameter": Calls._rebuild_parameter,
    "parameter_with_state": Calls._rebuild_parameter,
    "sparse_tensor": Calls._rebuild_sparse,
    "meta_tensor_no_storage": Calls._rebuild_meta,
    "nested_tensor": Calls._rebuild_nested,
    "device_tensor_from_cpu_tensor": Calls._rebuild_on_device,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": Calls._ordered_dict,
    "collections.Counter": Calls._ordered_dict,
    "builtins.set": Calls._set,
    "builtins.bytearray": Calls._bytearray,
    "builtins.complex": Calls._complex,
    "_codecs.encode": Calls._encode,
    "torch.Size": Calls._size,
    "torch.device": Calls._named,
    "torch.serialization._get_layout": Calls._named,
    "torch.nn.parameter.Parameter": Calls._parameter,
    "torch._tensor._rebuild_from_type_v2": Calls._rebuild_typed,
    **{f"torch._utils._rebuild_{name}": rule for name, rule in _REBUILDS.items()},
}
