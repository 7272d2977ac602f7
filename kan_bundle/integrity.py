"""Hashes of a bundle's files: taken at export, checked before anything is served."""

import hashlib
from pathlib import Path

from kan_bundle.errors import IntegrityError
from kan_bundle.manifest import FileRecord


def record_file(path: Path) -> FileRecord:
    """Take a file's size and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def check_file(path: Path, expected: FileRecord) -> None:
    """Compare a file with its record, without holding it in memory.

    Raises:
        IntegrityError: It is missing or differs.
    """
    try:
        found = record_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    _compare(path, found, expected)


def read_checked(path: Path, expected: FileRecord) -> bytes:
    """Read a file and compare with its record what was read, so that no one can swap it between.

    Raises:
        IntegrityError: It is missing or differs.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    _compare(path, FileRecord(len(content), hashlib.sha256(content).hexdigest()), expected)
    return content


def _unreadable(path: Path, error: OSError) -> IntegrityError:
    return IntegrityError(
        f"{path}: cannot be read: {error.strerror}; the manifest lists it: copy it or export again"
    )


def _compare(path: Path, found: FileRecord, expected: FileRecord) -> None:
    if found != expected:
        raise IntegrityError(
            f"{path}: expected {expected.size_bytes} bytes with SHA-256 {expected.sha256}, found "
            f"{found.size_bytes} bytes with {found.sha256}: changed since it was exported; copy "
            "it or export again"
        )
