"""What a pickle would have torch build, followed opcode by opcode with nothing built.

`torch.load(weights_only=True)` runs no code of a file's, but it allocates what a number in the file
says, copies what is named many times, and hashes what is nested without end. This scan follows
every opcode that torch's reader knows and keeps a note for each value; pickle_calls.py judges the
calls. What the scan has not followed to its end, torch is never given. This module reads no files.
"""

import gc
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kan_model.archives import LONGEST_NAME, Archive, UnreadableArchive, too_large
from kan_model.errors import CheckpointError
from kan_model.pickle_calls import ITEM_BYTES, Calls, shown_number
from kan_model.pickle_values import (
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

_MOST_VALUES = 4_000_000  # None and booleans; what takes more time or memory counts as several
_COSTS = dict.fromkeys("R\x81(]}\x8fQbcsut\x85\x86\x87)", 4) | dict.fromkeys("JKMG\x8aXUqrhj", 2)
_UINT8, _UINT16, _UINT32, _INT32, _DOUBLE = (
    struct.Struct(form) for form in ("<B", "<H", "<I", "<i", ">d")
)
_STOP = ord(".")

StorageNoter = Callable[[object, int, int], StorageNote]
"""Notes a storage, given its key, its numbers and the bytes of one."""


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
        UnreadableArchive: It is damaged.
        TorchRefuses: It has what torch's reader does not know.
        CheckpointError: It would take more than it may.
    """
    seen: dict[str, StorageNote] = {}

    def note(key: object, numbers: int, item: int) -> StorageNote:
        name = f"data/{key}" if isinstance(key, str) else ""
        found = seen.setdefault(name, StorageNote(numbers * item, item))
        held = archive.sizes.get(name, -1)
        if not 0 <= found.size <= held or found.size != numbers * item:
            raise Refused(
                f"claims a storage of {shown_number(numbers)} numbers of {item} bytes, of which "
                f"the file holds {max(held, 0):,} bytes"
            )
        return found

    scan = _Scan(archive.pickle, Calls(stand_ins, file_size), note)
    with _no_collections():
        scan.run(0)
    return scan.findings


def scan_legacy(content: bytes, file_size: int) -> None:
    """Scan the pickles of a file in torch's format from before 1.6.

    Args:
        content: Its first `LARGEST_PICKLE` bytes, or all of it.
        file_size: Bytes of the file.

    Raises:
        UnreadableArchive: It is damaged.
        TorchRefuses: It has what torch's reader does not know.
        CheckpointError: It would take more than it may.
    """
    seen: dict[object, StorageNote] = {}
    claimed = 0

    def note(key: object, numbers: int, item: int) -> StorageNote:
        nonlocal claimed
        if isinstance(key, str | int) and numbers >= 0:
            if key not in seen:
                seen[key] = StorageNote(numbers * item, item)
                claimed += numbers * item
            if claimed <= file_size and numbers * item <= seen[key].size:
                return seen[key]
        raise Refused(
            f"claims a storage of {shown_number(numbers)} numbers of {item} bytes, the file has "
            f"{file_size:,} bytes in all"
        )

    scan = _Scan(content, Calls((), file_size), note)
    at = 0
    try:
        with _no_collections():
            for _ in range(5):  # magic number, version, machine, content, keys
                at = scan.run(at)
    except UnreadableArchive:
        if file_size > len(content):  # the rest of it was not read
            raise CheckpointError(too_large(file_size)) from None
        raise


@contextmanager
def _no_collections() -> Iterator[None]:
    """Have Python not look for garbage: notes are many, and all of them are in use."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Scan:
    """Follows pickles as torch's reader does.

    Args:
        content: Bytes of pickles.
        calls: Judges calls.
        note_storage: Notes a storage.
    """

    def __init__(self, content: bytes, calls: Calls, note_storage: StorageNoter) -> None:
        self.findings = Findings()
        self.stack: list[Any] = []
        self._content = content
        self._calls = calls
        self._note_storage = note_storage
        self._at = self._values = 0
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, at: int) -> int:
        """Follow one pickle.

        Args:
            at: Offset of its first byte.

        Returns:
            The offset behind its last byte.

        Raises:
            CheckpointError: As `scan_archive`.
        """
        self._at = at
        self.stack, self._marks, self._memo = [], [], {}
        content, opcodes = self._content, _OPCODES
        try:
            while True:
                opcode = content[self._at]
                self._at += 1
                if opcode == _STOP:
                    self.stack.pop()
                    return self._at
                found = opcodes.get(opcode)
                if found is None:
                    raise TorchRefuses(f"opcode {opcode}")
                action, cost = found
                self._values += cost
                if self._values > _MOST_VALUES:
                    raise Refused(
                        f"holds too many values: expected at most {_MOST_VALUES:,}, where a number "
                        "or a text counts as 2 and a tuple, list, dict or object as 4"
                    )
                action(self)
        except (IndexError, KeyError, UnicodeDecodeError) as error:
            raise UnreadableArchive("its pickle is damaged") from error
        finally:
            self.stack, self._marks, self._memo = [], [], {}

    def take(self, count: int) -> bytes:
        """Read an argument."""
        found = self._content[self._at : self._at + count]
        if len(found) < count:
            raise IndexError
        self._at += count
        return found

    def number(self, form: struct.Struct) -> Any:
        """Read an argument that is a number."""
        return form.unpack(self.take(form.size))[0]

    def _line(self) -> str:
        end = self._content.find(b"\n", self._at, self._at + LONGEST_NAME)
        if end < 0:
            raise Refused(f"names a class in more than {LONGEST_NAME:,} characters")
        found = self._content[self._at : end]
        self._at = end + 1
        return found.decode()

    def pop_mark(self) -> list[Any]:
        """Take the values behind the last mark."""
        items, self.stack = self.stack, self._marks.pop()
        return items

    def mark(self) -> None:
        """Begin a row of values."""
        self._marks.append(self.stack)
        self.stack = []

    def push_name(self) -> None:
        """Push a class, function or constant by its name."""
        module, name = self._line(), self._line()
        if (module, name) in NAME_MAPPING:  # Python 2's
            module, name = NAME_MAPPING[module, name]
        else:
            module = IMPORT_MAPPING.get(module, module)
        text = f"{module}.{name}"
        self._calls.look_up(text)
        self.stack.append(Name(text))

    def push_text(self) -> None:
        """Push a string, or a note of a long one."""
        text = self.take(self.number(_UINT32))
        long = len(text) > LONGEST_NAME
        self.stack.append(Long(len(text)) if long else str(text, "utf-8", "surrogatepass"))

    def push_long(self) -> None:
        """Push a whole number of many bytes."""
        self.stack.append(int.from_bytes(self.take(self.number(_UINT8)), "little", signed=True))

    def get(self, index: int) -> None:
        """Push what was noted under a number."""
        self.stack.append(self._memo[index])

    def put(self, index: int) -> None:
        """Note the topmost value under a number."""
        self._memo[index] = self.stack[-1]

    def make_tuple(self, count: int) -> None:
        """Push a tuple of the topmost values."""
        start = len(self.stack) - count
        if start < 0:
            raise IndexError
        items = self.stack[start:]
        del self.stack[start:]
        self.stack.append(as_tuple(items))

    def make_long_tuple(self) -> None:
        """Push a tuple of the values behind the last mark."""
        items = self.pop_mark()
        self.stack.append(as_tuple(items))

    def append(self, items: Sequence[Any]) -> None:
        """Append values to a list."""
        target = self.stack[-1]
        if isinstance(target, Group) and target.kind == "list":
            target.items += items
            target.count += len(items)
        elif isinstance(target, Made) and target.name in self._calls.stand_ins:
            self.findings.lists.add(target.name)
        else:
            raise TorchRefuses("a value is appended to what is no list")

    def set_items(self, items: Sequence[Any]) -> None:
        """Put values into a dict by their keys."""
        target = self.stack[-1]
        for key in items[::2]:
            self._calls.check_key(key)
        if isinstance(target, Group) and target.kind in ("dict", "OrderedDict"):
            target.count += len(items) // 2
        elif isinstance(target, Made) and target.name in self._calls.stand_ins:
            self.findings.mappings.add(target.name)
        else:
            raise TorchRefuses("an item is set in what is no dict")

    def push_storage(self) -> None:
        """Push the storage that a persistent id stands for."""
        match self.stack.pop():
            case Group("tuple", ["storage", Name(text), key, _, int(numbers), *views]):
                if text not in ITEM_BYTES:
                    raise Refused(f"has a storage of an unknown type, {text}")
                found = self._note_storage(key, numbers, ITEM_BYTES[text])
                match views:
                    case [] | [None]:
                        pass
                    case [Group("tuple", [_, int(first), int(count)])]:
                        if not (first >= 0 and count >= 0 and first + count <= numbers):
                            raise Refused("views a part of a storage that is not in it")
                        found = StorageNote(count * found.item, found.item)
                    case _:
                        raise TorchRefuses("a view of a storage is none")
                self.stack.append(found)
            case _:
                raise TorchRefuses("a persistent id is no storage")

    def reduce(self) -> None:
        """Push what a call returns."""
        arguments = self.stack.pop()
        called = self.stack.pop()
        self.stack.append(self._calls.call(called, arguments))

    def build(self) -> None:
        """Set the state of the topmost value."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Group) and target.kind == "OrderedDict":
            self._calls.copied_group(state)
        elif isinstance(target, Made) and target.name in self._calls.stand_ins:
            self._calls.look_up(target.name)
            self._calls.copy(state.items[0] if is_tuple(state) and state.items else state)
        elif isinstance(target, Made) and target.name == "tensor" and is_tuple(state):
            match state.items:
                case [StorageNote() as storage, offset, size, stride]:
                    self._calls.view(storage, storage.item, offset, size, stride)
                case [Made("tensor"), _, _, _, _]:  # of a parameter
                    pass
                case _:
                    raise Refused("sets a tensor to what is no storage")
        else:
            raise Refused("sets the state of an object that has none")


def _pushing(value: object) -> Callable[[_Scan], None]:
    return lambda scan: scan.stack.append(value)


def _reading(form: struct.Struct) -> Callable[[_Scan], None]:
    return lambda scan: scan.stack.append(scan.number(form))


def _opening(kind: str) -> Callable[[_Scan], None]:
    return lambda scan: scan.stack.append(Group(kind))


_OPCODES: dict[int, tuple[Callable[[_Scan], object], int]] = {
    ord(opcode): (action, _COSTS.get(opcode, 1))
    for opcode, action in {
        "\x80": lambda scan: scan.take(1),  # the protocol
        "(": _Scan.mark,
        "c": _Scan.push_name,
        "R": _Scan.reduce,
        "\x81": _Scan.reduce,  # NEWOBJ
        "b": _Scan.build,
        "a": lambda scan: scan.append([scan.stack.pop()]),
        "e": lambda scan: scan.append(scan.pop_mark()),
        "s": lambda scan: scan.set_items([scan.stack.pop(), scan.stack.pop()][::-1]),
        "u": lambda scan: scan.set_items(scan.pop_mark()),
        "t": _Scan.make_long_tuple,
        "\x85": lambda scan: scan.make_tuple(1),
        "\x86": lambda scan: scan.make_tuple(2),
        "\x87": lambda scan: scan.make_tuple(3),
        ")": lambda scan: scan.make_tuple(0),
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
        "X": _Scan.push_text,
        "U": lambda scan: scan.stack.append(scan.take(scan.number(_UINT8)).decode()),
        "\x8a": _Scan.push_long,
        "Q": _Scan.push_storage,
        "h": lambda scan: scan.get(scan.number(_UINT8)),
        "j": lambda scan: scan.get(scan.number(_UINT32)),
        "q": lambda scan: scan.put(scan.number(_UINT8)),
        "r": lambda scan: scan.put(scan.number(_UINT32)),
    }.items()
}
