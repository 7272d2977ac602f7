"""What archives and safetensors files claim, checked before torch and safetensors read them.

Both of those believe sizes and offsets that a file states. Python's zipfile and torch's reader find
the entries of an archive in ways of their own, so an archive passes only if it leaves them no
choice: no comment, nothing before or after, one directory, and entries that do not overlap.
torch.save writes nothing else. This module reads bytes and builds nothing from them.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from kan_model.errors import CheckpointError

LONGEST_NAME = 1024
"""Characters of a name in a file: of an entry, of a tensor with all that stands before it."""

MOST_NAMES = 100_000
"""Tensors, entries or modules in a file."""

LARGEST_PICKLE = 2**25
"""Bytes of what a file holds beside the numbers of its tensors."""

_LARGEST_INDEX = 2**23  # bytes of an archive's directory, or of a safetensors header
_MOST_DIMENSIONS = 64  # as in torch
_TAIL = struct.Struct("<4s4H2LH")  # end of central directory
_LOCATOR = struct.Struct("<4sLQL")  # of the one below
_TAIL_64 = struct.Struct("<4sQ2H2L4Q")  # end of central directory, zip64
_ENTRY = struct.Struct("<4s5H3L2H")  # local header
_WHAT_ZIPFILE_RAISES = (
    *(BadZipFile, EOFError, NotImplementedError, OSError, OverflowError, RuntimeError),
    *(ValueError, struct.error, zlib.error),
)


class UnreadableArchive(CheckpointError):
    """An archive that torch.save did not write, or that is damaged."""


@dataclass(frozen=True)
class Archive:
    """An archive of torch.save.

    Attributes:
        pickle: Its data.pkl.
        sizes: Bytes of each entry, by its name in the archive's one folder.
    """

    pickle: bytes
    sizes: Mapping[str, int]


def read_archive(path: Path, size: int) -> Archive:
    """Read the directory and the pickle of an archive, and check all that it holds.

    Args:
        path: The file.
        size: Its bytes.

    Raises:
        UnreadableArchive: torch.save did not write it, or it is damaged beyond reading.
        CheckpointError: It claims what it cannot hold, or disagrees with a checksum.
    """
    try:
        with path.open("rb") as file:
            end = find_directory(file, size)
            with ZipFile(file) as archive:
                entries = archive.infolist()
                root = _require_torch(entries)
                _require_plain(file, entries, end)
                pickle = _entry(archive, f"{root}/data.pkl")
                damaged = archive.testzip()
    except _WHAT_ZIPFILE_RAISES as error:
        raise UnreadableArchive(f"cannot be read as an archive: {error}") from error
    if damaged is not None:
        raise CheckpointError(
            f"{damaged[:LONGEST_NAME]} does not agree with its checksum: the file is damaged, or "
            "was saved with set_crc32_options(False); copy it again or save it anew"
        )
    prefix = f"{root}/"
    sizes = {
        entry.filename.removeprefix(prefix): entry.file_size
        for entry in entries
        if entry.filename.startswith(prefix)
    }
    return Archive(pickle, sizes)


def find_directory(file: BufferedReader, size: int) -> int:
    """Find where an archive's directory begins, in the one way that leaves no other.

    Args:
        file: The archive.
        size: Its bytes.

    Returns:
        Its first byte's offset, where entries end.

    Raises:
        BadZipFile: There is no directory, or another way to find one.
        CheckpointError: It is too large to be read.
    """
    at = size - _TAIL.size
    signature, *disks, count, length, start, comment = _TAIL.unpack(_read(file, at, _TAIL.size))
    if signature != b"PK\5\6" or comment or any(disks[:2]):
        raise BadZipFile("it does not end with the end of its directory")
    if at >= _LOCATOR.size:
        locator = _LOCATOR.unpack(_read(file, at - _LOCATOR.size, _LOCATOR.size))
        if locator[0] == b"PK\6\7":
            at -= _LOCATOR.size + _TAIL_64.size
            tail = _TAIL_64.unpack(_read(file, at, _TAIL_64.size))
            if tail[0] != b"PK\6\6" or locator[2] != at:
                raise BadZipFile("the end of its directory is not where it is said to be")
            count, length, start = tail[-3:]
    if start + length != at:
        raise BadZipFile("its directory is not where it is said to be")
    if length > _LARGEST_INDEX or count > MOST_NAMES:
        raise CheckpointError(
            f"its directory has {count:,} entries in {length:,} bytes, expected at most "
            f"{MOST_NAMES:,} in {_LARGEST_INDEX:,}; save only the network's own state dict"
        )
    return int(start)


def _read(file: BufferedReader, offset: int, count: int) -> bytes:
    if offset < 0:
        raise BadZipFile("it is too short")
    file.seek(offset)
    return file.read(count)


def _require_torch(entries: list[ZipInfo]) -> str:
    """Return the folder that torch reads: that of the first entry."""
    root = entries[0].filename.partition("/")[0] if entries else ""
    names = {entry.filename for entry in entries}
    if f"{root}/data.pkl" not in names or f"{root}/constants.pkl" in names:
        raise UnreadableArchive("torch.save did not write it")
    return root


def _require_plain(file: BufferedReader, entries: list[ZipInfo], end: int) -> None:
    """Refuse entries that are compressed, overlap, or share a name as torch compares names."""
    longest = max(len(entry.filename) for entry in entries)
    if longest > LONGEST_NAME:
        raise CheckpointError(
            f"holds an entry with a name of {longest:,} characters, expected at most "
            f"{LONGEST_NAME:,}; save only the network's own state dict"
        )
    if len({entry.filename.lower() for entry in entries}) < len(entries):
        raise CheckpointError("holds two entries of one name; save it anew")
    for entry in entries:
        if entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(
                f"{entry.filename}: is compressed, to {entry.compress_size:,} bytes of "
                f"{entry.file_size:,}, which torch.save does not do; save it anew"
            )
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    ends = [*(entry.header_offset for entry in ordered[1:]), end]
    for entry, limit in zip(ordered, ends, strict=True):
        signature, *_, name, extra = _ENTRY.unpack(_read(file, entry.header_offset, _ENTRY.size))
        start = entry.header_offset + _ENTRY.size + name + extra
        if signature != b"PK\3\4" or start + entry.compress_size > limit:
            raise CheckpointError(
                f"{entry.filename}: is {entry.file_size:,} bytes, which reach into what follows; "
                "copy it again or save it anew"
            )


def _entry(archive: ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > LARGEST_PICKLE:
        raise CheckpointError(too_large(size))
    return archive.read(name)


def too_large(size: int) -> str:
    """Word the refusal of a pickle by its size in bytes."""
    return (
        f"its pickle has {size:,} bytes, without the numbers of tensors, expected at most "
        f"{LARGEST_PICKLE:,}; save only the network's own state dict: "
        "torch.save(model.state_dict(), 'model.pt')"
    )


def check_safetensors(path: Path) -> None:
    """Check the header of a safetensors file; what it says of tensors, safetensors checks itself.

    Raises:
        CheckpointError: It is too large, is no JSON, or has names or shapes without end.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_INDEX:
            raise CheckpointError(
                f"its header has {length:,} bytes, expected at most {_LARGEST_INDEX:,}; save only "
                "the network's own state dict"
            )
        header = file.read(length)
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "is not a whole safetensors file: its header is no JSON; copy or save it again"
        ) from error
    longest = max(map(len, content), default=0)
    if len(content) > MOST_NAMES or longest > LONGEST_NAME:
        raise CheckpointError(
            f"holds {len(content):,} tensors, with names of up to {longest:,} characters; expected "
            f"at most {MOST_NAMES:,} of {LONGEST_NAME:,}; save only the network's own state dict"
        )
    for name, entry in content.items():
        shape = entry.get("shape", ()) if isinstance(entry, dict) else ()
        if isinstance(shape, list) and len(shape) > _MOST_DIMENSIONS:
            raise CheckpointError(
                f"{name}: has {len(shape):,} dimensions, expected at most {_MOST_DIMENSIONS}; save "
                "it again"
            )
