"""Hashes of a bundle's files: taken at export, checked before anything is served."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from kan_bundle.errors import IntegrityError
from kan_bundle.layout import open_regular
from kan_bundle.manifest import FileRecord

_CHUNK = 2**20  # bytes


def record_file(path: Path, advance: Callable[[int], None] = lambda read: None) -> FileRecord:
    """Take a file's size and SHA-256.

    Args:
        path: The file.
        advance: Is told how many bytes have been read, time and again.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
        return FileRecord(os.fstat(file.fileno()).st_size, digest.hexdigest())


def check_file(path: Path, expected: FileRecord) -> None:
    """Compare a file with its record, without holding it in memory.

    Raises:
        IntegrityError: It is missing or differs.
    """
    with _opened(path, expected) as file:
        _require_digest(path, hashlib.file_digest(file, "sha256").hexdigest(), expected)


def read_checked(path: Path, expected: FileRecord) -> bytes:
    """Read a file and compare with its record what was read, so that no one can swap it between.

    Raises:
        IntegrityError: It is missing or differs.
    """
    with _opened(path, expected) as file:
        content = file.read(expected.size_bytes)
        _require_digest(path, hashlib.sha256(content).hexdigest(), expected)
        return content


def read_chunks(path: Path, expected: FileRecord) -> Iterator[bytes]:
    """Read a file piece by piece, and after the last compare with its record what was read.

    Raises:
        IntegrityError: It is missing or differs.
    """
    digest = hashlib.sha256()
    left = expected.size_bytes
    with _opened(path, expected) as file:
        while chunk := file.read(min(_CHUNK, left)):
            left -= len(chunk)
            digest.update(chunk)
            yield chunk
    _require_digest(path, digest.hexdigest(), expected)


@contextmanager
def _opened(path: Path, expected: FileRecord) -> Iterator[BufferedReader]:
    """Open a regular file of the size recorded."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.size_bytes:
                raise IntegrityError(
                    f"{path}: expected {expected.size_bytes} bytes, found {size}: "
                    "changed since it was exported; copy it or export again"
                )
            yield file
    except OSError as error:
        raise IntegrityError(
            f"{path}: cannot be read: {error.strerror}; the manifest lists it: copy it or export "
            "again"
        ) from error


def _require_digest(path: Path, found: str, expected: FileRecord) -> None:
    if found != expected.sha256:
        raise IntegrityError(
            f"{path}: expected SHA-256 {expected.sha256}, found {found}: changed since it was "
            "exported; copy it or export again"
        )
