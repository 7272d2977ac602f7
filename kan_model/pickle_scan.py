"""What a pickle would have torch build, followed opcode by opcode with nothing built.

`torch.load(weights_only=True)` runs no code of a file's, but it allocates what a number in the file
says, copies what is named many times, and hashes what is nested without end. This scan follows
every opcode that torch's reader knows, keeps a note for each value, and refuses a call unless its
arguments bound what it takes. At an opcode that torch refuses itself the scan ends. This module
reads no files.
"""

import math
import re
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch

from kan_model.archives import LONGEST_NAME, MOST_NAMES, Archive, too_large
from kan_model.errors import CheckpointError
from kan_model.stacks import RESAVE

_MOST_STEPS = 1_000_000  # opcodes
_MOST_COPIED = 2_000_000  # values that calls copy
_MOST_TEXT = 2**26  # bytes that calls copy
_MOST_LOOKUPS = 10_000_000  # torch compares each call with every class that is let through
_MOST_ODD_KEYS = 10_000  # their hashes can be made to collide, so each may cost as much as all
_MOST_IN_KEY = 1_000
_MOST_DIMENSIONS = 64  # as in torch
_MOST_NUMBERS = 2**62
_SLACK = 2**24  # bytes
_ENCODINGS = ("latin1", "latin-1", "utf-8", "utf8", "ascii")
_ITEM_BYTES = {
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
_TORCHS_OWN = ("torch._", "torch.storage.", "torch.cuda.", *_ITEM_BYTES)
_TENSOR_CLASS = re.compile(r"torch\.(?:cuda\.|sparse\.|cuda\.sparse\.)?[A-Za-z0-9]*Tensor")


class _Refused(CheckpointError):
    """The pickle would take more than it may.

    Args:
        what: What it does.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"its pickle {what}, so it is not opened; {RESAVE}")


class UnknownCall(_Refused):
    """The pickle calls what neither torch nor a stand-in is known to answer."""


class _TorchRefuses(Exception):
    """torch's reader fails at this opcode, so nothing behind it is run."""


@dataclass(slots=True)
class _Name:
    """A class, function or constant that the pickle names."""

    text: str


@dataclass(slots=True)
class _Long:
    """A text that is too long for a name."""

    size: int


@dataclass(slots=True)
class _Group:
    """A tuple, list, dict or set.

    Attributes:
        kind: Which.
        items: Of a tuple or list.
        count: Of values in it.
        weight: Values in it and in tuples within it, as often as they are met: the cost of a hash.
    """

    kind: str
    items: list[Any] = field(default_factory=list)
    count: int = 0
    weight: int = 1


_EMPTY = _Group("tuple")


@dataclass(slots=True)
class _Storage:
    """Numbers of tensors.

    Attributes:
        size: Bytes.
        item: Bytes of a number.
    """

    size: int
    item: int


@dataclass(slots=True)
class _Made:
    """What a call returns.

    Attributes:
        name: Of what was called.
        size: Bytes that a tensor claims, or of a text.
    """

    name: str
    size: int = 0


@dataclass
class Findings:
    """What a scan has found.

    Attributes:
        mappings: Classes of the file's own that are filled as dicts are.
        lists: Those that are filled as lists are.
    """

    mappings: set[str] = field(default_factory=set)
    lists: set[str] = field(default_factory=set)


def scan_archive(archive: Archive, stand_ins: Collection[str], file_size: int) -> Findings:
    """Scan the pickle of an archive.

    Args:
        archive: From `read_archive`.
        stand_ins: Names of what the file may call, because inert stand-ins answer it.
        file_size: Bytes of the file.

    Raises:
        CheckpointError: It would take more than it may.
    """
    seen: dict[str, _Storage] = {}

    def storage(key: object, numbers: int, item: int) -> _Storage:
        name = f"data/{key}" if isinstance(key, str) else ""
        found = seen.setdefault(name, _Storage(numbers * item, item))
        held = archive.sizes.get(name, -1)
        if not 0 <= found.size <= held or found.size != numbers * item:
            raise _Refused(
                f"claims a storage of {_shown(numbers)} numbers of {item} bytes, of which the file "
                f"holds {max(held, 0):,} bytes"
            )
        return found

    scan = _Scan(archive.pickle, stand_ins, storage, file_size)
    scan.run(0)
    return scan.findings


def scan_legacy(content: bytes, file_size: int) -> None:
    """Scan the pickles of a file in torch's format from before 1.6.

    Args:
        content: Its first `LARGEST_PICKLE` bytes, or all of it.
        file_size: Bytes of the file.

    Raises:
        CheckpointError: It would take more than it may.
    """
    claimed: dict[object, int] = {}

    def storage(key: object, numbers: int, item: int) -> _Storage:
        if isinstance(key, str | int) and numbers >= 0:
            claimed.setdefault(key, numbers * item)
            if sum(claimed.values()) <= file_size and numbers * item <= claimed[key]:
                return _Storage(numbers * item, item)
        raise _Refused(
            f"claims a storage of {_shown(numbers)} numbers of {item} bytes, the file has "
            f"{file_size:,} bytes in all"
        )

    scan = _Scan(content, (), storage, file_size)
    at = 0
    for _ in range(5):  # magic number, version, machine, content, keys
        ended = scan.run(at)
        if ended is None:
            if file_size > len(content):  # the rest of it was not scanned
                raise CheckpointError(too_large(file_size))
            return
        at = ended


class _Scan:
    """Follows pickles as torch's reader does.

    Args:
        content: Bytes of pickles.
        stand_ins: Names of what they may call.
        storage: Notes a storage, given its key, its numbers and the bytes of one.
        file_size: Bytes of the file.
    """

    def __init__(
        self,
        content: bytes,
        stand_ins: Collection[str],
        storage: Callable[[object, int, int], _Storage],
        file_size: int,
    ) -> None:
        self.findings = Findings()
        self._content = content
        self._stand_ins = stand_ins
        self._storage = storage
        self._most_claimed = 4 * file_size + _SLACK
        self._at = 0
        self._steps = self._copied = self._text = self._tensor_bytes = 0
        self._tensors = self._lookups = self._odd_keys = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, at: int) -> int | None:
        """Follow one pickle.

        Args:
            at: Offset of its first byte.

        Returns:
            The offset behind its last byte; None if torch refuses it.

        Raises:
            CheckpointError: It would take more than it may.
        """
        self._at = at
        self._stack, self._marks, self._memo = [], [], {}
        content, opcodes = self._content, _OPCODES
        try:
            while True:
                self._steps += 1
                if self._steps > _MOST_STEPS:
                    raise _Refused(f"has more than {_MOST_STEPS:,} steps")
                opcode = content[self._at]
                self._at += 1
                if opcode == _STOP:
                    self._stack.pop()
                    return self._at
                opcodes[opcode](self)
        except (_TorchRefuses, IndexError, KeyError, UnicodeDecodeError, struct.error):
            return None  # an end that comes too soon, an opcode or a place that is not there

    # What reads arguments.

    def _take(self, count: int) -> bytes:
        found = self._content[self._at : self._at + count]
        if len(found) < count:
            raise _TorchRefuses
        self._at += count
        return found

    def _number(self, form: struct.Struct) -> Any:
        return form.unpack(self._take(form.size))[0]

    def _line(self) -> str:
        end = self._content.find(b"\n", self._at, self._at + 2 * LONGEST_NAME)
        if end < 0:
            raise _Refused(f"names a class in more than {LONGEST_NAME:,} characters")
        found = self._content[self._at : end]
        self._at = end + 1
        return found.decode()

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    # What each opcode does.

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _global(self) -> None:
        module, name = self._line(), self._line()
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        else:
            module = IMPORT_MAPPING.get(module, module)
        text = f"{module}.{name}"
        if len(text) > LONGEST_NAME:
            raise _Refused(f"names a class in more than {LONGEST_NAME:,} characters")
        self._look_up(text)
        self._stack.append(_Name(text))

    def _look_up(self, name: str) -> None:
        if name in self._stand_ins:
            self._lookups += len(self._stand_ins)
            if self._lookups > _MOST_LOOKUPS:
                raise _Refused(
                    f"calls {len(self._stand_ins):,} classes of its own too many times over"
                )

    def _unicode(self) -> None:
        text = self._take(self._number(_UINT32))
        self._push_text(str(text, "utf-8", "surrogatepass") if len(text) < LONGEST_NAME else text)

    def _short_string(self) -> None:
        self._push_text(self._take(self._number(_UINT8)).decode())

    def _push_text(self, text: str | bytes) -> None:
        self._stack.append(text if isinstance(text, str) else _Long(len(text)))

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(_UINT8)), "little", signed=True))

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _tuple(self, count: int | None = None) -> None:
        if count is None:
            items = self._pop_mark()
        else:
            items = self._stack[len(self._stack) - count :]
            if len(items) < count:
                raise _TorchRefuses
            del self._stack[len(self._stack) - count :]
        self._stack.append(_as_tuple(items))

    def _append(self, items: Sequence[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, _Group) and target.kind == "list":
            target.items += items
            target.count += len(items)
        elif isinstance(target, _Made) and target.name in self._stand_ins:
            self.findings.lists.add(target.name)
        else:
            raise _TorchRefuses

    def _set_items(self, items: Sequence[Any]) -> None:
        target = self._stack[-1]
        for key in items[::2]:
            self._check_key(key)
        if isinstance(target, _Group) and target.kind in ("dict", "OrderedDict"):
            target.count += len(items) // 2
        elif isinstance(target, _Made) and target.name in self._stand_ins:
            self.findings.mappings.add(target.name)
        else:
            raise _TorchRefuses

    def _check_key(self, key: object) -> None:
        """Refuse a key that is long, or whose hash is slow."""
        if isinstance(key, _Long):
            raise _Refused(
                f"has a name of {key.size:,} bytes, expected at most {LONGEST_NAME:,} characters"
            )
        if isinstance(key, str | float | bool | None | _Name) or (
            isinstance(key, int) and -_MOST_NUMBERS < key < _MOST_NUMBERS
        ):
            return
        self._odd_keys += 1
        too_heavy = isinstance(key, _Group) and key.weight > _MOST_IN_KEY
        if isinstance(key, int) or too_heavy or self._odd_keys > _MOST_ODD_KEYS:
            raise _Refused("has keys of dicts or sets that take long to compare")

    def _persistent(self) -> None:
        match self._stack.pop():
            case _Group("tuple", ["storage", _Name(text), key, _, int(numbers), *views]):
                if text not in _ITEM_BYTES:
                    raise _Refused(f"has a storage of an unknown type, {text}")
                found = self._storage(key, numbers, _ITEM_BYTES[text])
                match views:
                    case [] | [None]:
                        pass
                    case [_Group("tuple", [_, int(first), int(count)])]:
                        if not (first >= 0 and count >= 0 and first + count <= numbers):
                            raise _Refused("views a part of a storage that is not in it")
                        found = _Storage(count * found.item, found.item)
                    case _:
                        raise _TorchRefuses
                self._stack.append(found)
            case _:
                raise _TorchRefuses

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        called = self._stack.pop()
        self._stack.append(self._call(called, arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, _Group) and target.kind == "OrderedDict":
            self._copied_group(state)
        elif isinstance(target, _Made) and target.name in self._stand_ins:
            self._look_up(target.name)
            first = state.items[0] if _is_tuple(state) and state.items else state
            self._copy(first)
        elif isinstance(target, _Made) and target.name == "tensor" and _is_tuple(state):
            match state.items:
                case [_Storage() as storage, offset, size, stride]:
                    self._view(storage, storage.item, offset, size, stride)
                case [_Made("tensor"), _, _, _, _]:  # of a parameter
                    pass
                case _:
                    raise _Refused("sets a tensor to what is no storage")
        else:
            raise _Refused("sets the state of an object that has none")

    # What may be called, and with what.

    def _call(self, called: object, arguments: object) -> Any:
        if not isinstance(called, _Name):
            raise _TorchRefuses  # an object; only what a name stands for may be called
        if not _is_tuple(arguments):
            raise _Refused(f"calls {called.text} with arguments that are no tuple")
        given = arguments.items
        rule = _CALLS.get(called.text)
        if rule is not None:
            try:
                return rule(self, *given)
            except TypeError as error:
                raise _Refused(f"calls {called.text} with {len(given)} arguments") from error
        if called.text in self._stand_ins:
            self._look_up(called.text)
            return _Made(called.text)
        if _TENSOR_CLASS.fullmatch(called.text) and not given:
            return self._tensor(0)
        wrong = _Refused if called.text.startswith(_TORCHS_OWN) else UnknownCall
        raise wrong(f"calls {called.text} in a way that torch.save does not write")

    def _copy(self, values: object) -> None:
        """Count what a call copies."""
        if isinstance(values, _Group):
            self._copied += values.count
        elif isinstance(values, _Made | _Long):
            self._text += values.size
        elif isinstance(values, str):
            self._text += len(values)
        if self._copied > _MOST_COPIED or self._text > _MOST_TEXT:
            raise _Refused("copies its parts too many times over")

    def _copied_group(self, values: object) -> _Group:
        """Count what a call copies of a tuple, list, dict or set."""
        if not isinstance(values, _Group):
            raise _Refused("copies what is no tuple, list, dict or set")
        self._copy(values)
        return values

    def _ordered_dict(self, pairs: object = _EMPTY) -> _Group:
        found = self._copied_group(pairs)
        for pair in found.items:
            if isinstance(pair, _Group) and pair.items:
                self._check_key(pair.items[0])
            else:
                self._check_key(pair)  # of a Counter
        return _Group("OrderedDict", count=found.count)

    def _set(self, values: object = _EMPTY) -> _Group:
        found = self._copied_group(values)
        for value in found.items:
            self._check_key(value)
        return _Group("set", count=found.count)

    def _size(self, sizes: object = _EMPTY) -> _Group:
        return _as_tuple(list(self._copied_group(sizes).items))

    def _encode(self, text: object, encoding: object = "utf-8") -> _Made:
        if encoding not in _ENCODINGS or not isinstance(text, str | _Long):
            raise _Refused("encodes text in a way that torch.save does not")
        self._copy(text)
        return _Made("bytes", text.size if isinstance(text, _Long) else len(text))

    def _bytearray(self, content: object = "", encoding: object = "latin-1") -> _Made:
        if not isinstance(content, str | _Long | _Made) or encoding not in _ENCODINGS:
            raise _Refused("makes an array of bytes from something other than bytes")
        self._copy(content)
        return _Made("bytearray")

    def _complex(self, *parts: object) -> _Made:
        if not all(isinstance(part, int | float) for part in parts):
            raise _Refused("makes a complex number from something other than numbers")
        return _Made("complex")

    def _named(self, *parts: object) -> _Made:
        """Make a device or a layout."""
        if not all(isinstance(part, int | str) for part in parts):
            raise _Refused("names a device or a layout by something other than a name")
        return _Made("constant")

    def _tensor(self, size: int) -> _Made:
        self._tensors += 1
        if self._tensors > MOST_NAMES:
            raise _Refused(f"holds more than {MOST_NAMES:,} tensors")
        return _Made("tensor", size)

    def _view(
        self, storage: object, item: int, offset: object, size: object, stride: object
    ) -> int:
        """Check that a tensor lies in its storage.

        Returns:
            Bytes that it claims.
        """
        sizes, strides = _whole_numbers(size), _whole_numbers(stride)
        if not isinstance(storage, _Storage) or not isinstance(offset, int) or offset < 0:
            raise _Refused("makes a tensor of what is no storage")
        if len(sizes) != len(strides):
            raise _Refused("makes a tensor with other strides than sizes")
        last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if 0 not in sizes and (last + 1) * item > storage.size:
            raise _Refused(
                f"has a tensor of shape {tuple(sizes)} that reaches beyond its storage of "
                f"{storage.size:,} bytes"
            )
        if offset * item > storage.size:
            raise _Refused("has a tensor that begins beyond its storage")
        return math.prod(sizes) * item

    def _rebuild(
        self, storage: object, offset: object, size: object, stride: object, *rest: object
    ) -> _Made:
        item = storage.item if isinstance(storage, _Storage) else 1
        return self._tensor(self._view(storage, item, offset, size, stride))

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
    ) -> _Made:
        return self._tensor(self._view(storage, _item_bytes(dtype), offset, size, stride))

    def _rebuild_quantized(
        self,
        storage: object,
        offset: object,
        size: object,
        stride: object,
        parameters: object,
        *rest: object,
    ) -> _Made:
        made = self._rebuild(storage, offset, size, stride)
        if isinstance(storage, _Storage) and made.size > storage.size:  # it is allocated
            raise _Refused(f"has a quantized tensor that claims {made.size:,} bytes")
        if isinstance(parameters, _Group):
            for part in parameters.items:
                self._copy(part)
        return made

    def _rebuild_parameter(self, tensor: object, *rest: object) -> _Made:
        if not isinstance(tensor, _Made) or tensor.name != "tensor":
            raise _Refused("makes a parameter of what is no tensor")
        for state in rest[2:]:
            self._copy_state(state)
        return self._tensor(tensor.size)

    def _parameter(self, *given: object) -> _Made:
        return self._rebuild_parameter(*given) if given else self._tensor(0)

    def _rebuild_typed(self, called: object, kind: object, arguments: object, state: object) -> Any:
        self._copy_state(state)
        return self._call(called, arguments)

    def _copy_state(self, state: object) -> None:
        for part in state.items if _is_tuple(state) else [state]:
            self._copy(part)

    def _rebuild_sparse(self, layout: object, data: object) -> _Made:
        for part in data.items if _is_tuple(data) else ():
            if _is_tuple(part):
                _whole_numbers(part)
        return self._tensor(0)

    def _rebuild_meta(
        self, dtype: object, size: object, stride: object, needs_gradient: object
    ) -> _Made:
        _whole_numbers(size)
        _whole_numbers(stride)
        return self._tensor(0)

    def _rebuild_nested(self, *tensors: object) -> _Made:
        if not all(isinstance(tensor, _Made) for tensor in tensors):
            raise _Refused("makes a nested tensor of what is no tensor")
        return self._tensor(0)

    def _rebuild_on_device(
        self, tensor: object, dtype: object, device: object, needs_gradient: object
    ) -> _Made:
        if not isinstance(tensor, _Made) or tensor.name != "tensor":
            raise _Refused("copies what is no tensor")
        size = 16 * tensor.size  # of the smallest numbers to the largest
        self._tensor_bytes += size
        if self._tensor_bytes > self._most_claimed:
            raise _Refused("copies tensors too many times over")
        return self._tensor(size)


def _is_tuple(value: object) -> TypeGuard[_Group]:
    return isinstance(value, _Group) and value.kind == "tuple"


def _as_tuple(items: list[Any]) -> _Group:
    inner = sum(part.weight for part in items if isinstance(part, _Group))
    weight = min(1 + len(items) + inner, _MOST_NUMBERS)
    return _Group("tuple", items, len(items), weight)


def _whole_numbers(sizes: object) -> list[int]:
    found = sizes.items if isinstance(sizes, _Group) else None
    if found is None or len(found) > _MOST_DIMENSIONS:
        raise _Refused(f"has a tensor of more than {_MOST_DIMENSIONS} dimensions, or of none")
    if not all(isinstance(n, int) and n >= 0 for n in found):
        raise _Refused("has a tensor with sizes or strides that are no numbers")
    if math.prod(max(n, 1) for n in found) >= _MOST_NUMBERS:
        raise _Refused("has a tensor that claims more than 2**62 numbers")
    return list(found)


def _item_bytes(dtype: object) -> int:
    found = getattr(torch, dtype.text.rpartition(".")[2], None) if isinstance(dtype, _Name) else 0
    if not isinstance(found, torch.dtype):
        raise _Refused("makes a tensor of an unknown type")
    return found.itemsize


def _shown(number: int) -> str:
    return f"{number:,}" if abs(number) < _MOST_NUMBERS else "more than 2**62"


_UINT8, _UINT16, _UINT32, _INT32, _DOUBLE = (
    struct.Struct(form) for form in ("<B", "<H", "<I", "<i", ">d")
)
_STOP = ord(".")


def _pushing(value: object) -> Callable[[_Scan], None]:
    return lambda scan: scan._stack.append(value)


def _reading(form: struct.Struct) -> Callable[[_Scan], None]:
    return lambda scan: scan._stack.append(scan._number(form))


def _opening(kind: str) -> Callable[[_Scan], None]:
    return lambda scan: scan._stack.append(_Group(kind))


_OPCODES: dict[int, Callable[[_Scan], object]] = {
    ord(opcode): action
    for opcode, action in {
        "\x80": lambda scan: scan._take(1),  # the protocol
        "(": _Scan._mark,
        "c": _Scan._global,
        "R": _Scan._reduce,
        "\x81": _Scan._reduce,  # NEWOBJ
        "b": _Scan._build,
        "a": lambda scan: scan._append([scan._stack.pop()]),
        "e": lambda scan: scan._append(scan._pop_mark()),
        "s": lambda scan: scan._set_items([scan._stack.pop(), scan._stack.pop()][::-1]),
        "u": lambda scan: scan._set_items(scan._pop_mark()),
        "t": _Scan._tuple,
        "\x85": lambda scan: scan._tuple(1),
        "\x86": lambda scan: scan._tuple(2),
        "\x87": lambda scan: scan._tuple(3),
        ")": lambda scan: scan._tuple(0),
        "N": _pushing(None),
        "\x89": _pushing(value=False),
        "\x88": _pushing(value=True),
        "]": _opening("list"),
        "}": _opening("dict"),
        "\x8f": _opening("set"),
        "J": _reading(_INT32),
        "K": _reading(_UINT8),
        "M": _reading(_UINT16),
        "G": _reading(_DOUBLE),
        "X": _Scan._unicode,
        "U": _Scan._short_string,
        "\x8a": _Scan._long,
        "Q": _Scan._persistent,
        "h": lambda scan: scan._get(scan._number(_UINT8)),
        "j": lambda scan: scan._get(scan._number(_UINT32)),
        "q": lambda scan: scan._put(scan._number(_UINT8)),
        "r": lambda scan: scan._put(scan._number(_UINT32)),
    }.items()
}

_REBUILDS: dict[str, Callable[..., Any]] = {
    "tensor": _Scan._rebuild,
    "tensor_v2": _Scan._rebuild,
    "tensor_v3": _Scan._rebuild_v3,
    "qtensor": _Scan._rebuild_quantized,
    "parameter": _Scan._rebuild_parameter,
    "parameter_with_state": _Scan._rebuild_parameter,
    "sparse_tensor": _Scan._rebuild_sparse,
    "meta_tensor_no_storage": _Scan._rebuild_meta,
    "nested_tensor": _Scan._rebuild_nested,
    "device_tensor_from_cpu_tensor": _Scan._rebuild_on_device,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Scan._ordered_dict,
    "collections.Counter": _Scan._ordered_dict,
    "builtins.set": _Scan._set,
    "builtins.bytearray": _Scan._bytearray,
    "builtins.complex": _Scan._complex,
    "_codecs.encode": _Scan._encode,
    "torch.Size": _Scan._size,
    "torch.device": _Scan._named,
    "torch.serialization._get_layout": _Scan._named,
    "torch.nn.parameter.Parameter": _Scan._parameter,
    "torch._tensor._rebuild_from_type_v2": _Scan._rebuild_typed,
    **{f"torch._utils._rebuild_{name}": rule for name, rule in _REBUILDS.items()},
}
