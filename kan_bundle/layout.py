"""Where things lie in a model repository, and how a version gets there whole or not at all.

    models/               the repository
      digits/             one model
        config.pbtxt      what Triton needs to serve the same folder
        1/                one version, a positive integer: a bundle
          model.onnx, model.ts, golden.npz, manifest.json
          model.onnx.data   weights that do not fit into model.onnx
          model.sig         who wrote it, if it is signed

A version is written into a hidden folder inside the repository, so on the same file system, and
renamed into place when it is complete. Readers pass over hidden folders.
"""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from unicodedata import combining, normalize

from kan_bundle.errors import LayoutError

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
TORCHSCRIPT_FILE = "model.ts"
GOLDEN_FILE = "golden.npz"
REPORT_FILE = "report.html"
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "model.sig"
CONFIG_FILE = "config.pbtxt"

_LONGEST_NAME = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")  # fits a signed 64-bit integer
_REPLACED = "replaced"


@dataclass(frozen=True, order=True)
class BundleFolder:
    """A version's place in a repository."""

    name: str
    version: int
    path: Path


def check_name(name: str) -> str:
    """Return `name` if it can be a model's name.

    Raises:
        LayoutError: It cannot, because it names a folder and travels in requests.
    """
    if not _NAME.fullmatch(name):
        raise LayoutError(
            f"model name {name!r}: expected 1 to 128 letters, digits, '.', '_' or '-', the first "
            "a letter or a digit; choose one with --name"
        )
    return name


def name_from_stem(stem: str) -> str:
    """Derive a model's name from the stem of a file's name.

    Accents are dropped, other characters that a name may not have become '-', and what is too
    long is cut.

    Args:
        stem: In any characters: `epoch=9-step=1000` becomes `epoch-9-step-1000`.

    Returns:
        The stem itself where it can be a name.

    Raises:
        LayoutError: Nothing is left of it.
    """
    if _NAME.fullmatch(stem):
        return stem
    plain = "".join(c for c in normalize("NFKD", stem) if not combining(c))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).lstrip("._-")[:_LONGEST_NAME].rstrip("-")
    if not name:
        raise LayoutError(
            f"no model name can be derived from {stem!r}: it has no letter or digit of ASCII; "
            "choose one with --name"
        )
    return name


def parse_version(text: str) -> int | None:
    """Read a version folder's name; None when it is not a positive integer as we write them."""
    return int(text) if _VERSION.fullmatch(text) else None


def check_version(version: int) -> int:
    """Return `version` if it can be a version's number.

    Raises:
        LayoutError: It cannot.
    """
    if parse_version(str(version)) is None:
        raise LayoutError(
            f"version {version}: expected a positive integer of at most 18 digits; leave it out "
            "for the next free one"
        )
    return version


def find_bundles(
    repository: Path, on_skipped: Callable[[Path, str], None] = lambda path, reason: None
) -> list[BundleFolder]:
    """List every version folder of every model, by name and version.

    Hidden entries and files are passed over; any other entry that is not a model or a version is
    skipped, and so is what cannot be read.

    Args:
        repository: The folder.
        on_skipped: Told what was skipped and why.

    Raises:
        LayoutError: The repository itself is not a folder that can be read.
    """
    try:
        entries = sorted(repository.iterdir())
    except OSError as error:
        raise LayoutError(
            f"{repository}: cannot be read as a model repository: {error.strerror}; expected a "
            "folder of MODEL/VERSION/ folders, as `python -m export` writes them"
        ) from error
    bundles = []
    for model in entries:
        if model.name.startswith(".") or not model.is_dir():
            continue
        if not _NAME.fullmatch(model.name):
            on_skipped(model, "not a model's name")
            continue
        try:
            folders = [entry for entry in model.iterdir() if entry.is_dir()]
        except OSError as error:
            on_skipped(model, f"cannot be read: {error.strerror}")
            continue
        for folder in folders:
            version = parse_version(folder.name)
            if version is None:
                on_skipped(folder, "not a version, a positive integer")
            else:
                bundles.append(BundleFolder(model.name, version, folder))
    return sorted(bundles)


def model_bytes(repository: Path) -> int:
    """Count the bytes of the models of a repository with their weights: the largest versions.

    Raises:
        LayoutError: The repository itself is not a folder that can be read.
    """
    largest: dict[str, int] = {}
    for bundle in find_bundles(repository):
        size = 0
        for name in (MODEL_FILE, WEIGHTS_FILE):
            with suppress(OSError):  # it is not there, or is found to be damaged when it is loaded
                size += (bundle.path / name).stat().st_size
        largest[bundle.name] = max(size, largest.get(bundle.name, 0))
    return sum(largest.values())


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading if it is a regular one: a pipe or a device would hang its reader.

    Raises:
        OSError: It cannot be opened, or is something else.
    """
    # Without O_NONBLOCK the very opening of a pipe waits for its writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "expected a regular file, found something else", str(path))
    return file


def next_version(repository: Path, name: str) -> int:
    """Give the number after a model's highest version, 1 for a new model.

    Raises:
        LayoutError: There is no such number.
    """
    model = repository / name
    taken = [parse_version(entry.name) or 0 for entry in model.iterdir()] if model.is_dir() else []
    version = max(taken, default=0) + 1
    if parse_version(str(version)) is None:
        raise LayoutError(f"{model}: version {version - 1} is the highest; choose one by --version")
    return version


class Staging:
    """A version being written. `path` is its folder; nothing is seen of it until `publish`."""

    def __init__(self, root: Path, target: BundleFolder) -> None:
        self.path = root / str(target.version)
        self._root = root
        self._target = target

    def keeps_config(self, config: str, *, force: bool) -> bool:
        """Tell whether there is a `config.pbtxt` that `publish` keeps, and that differs.

        Args:
            config: Text of `config.pbtxt`.
            force: As in `publish`.

        Raises:
            OSError: It cannot be read.
        """
        there = self._target.path.parent / CONFIG_FILE
        return there.exists() and not force and there.read_bytes() != config.encode()

    def publish(self, config: str, *, force: bool) -> None:
        """Move the version into the repository.

        An existing `config.pbtxt` is kept, because its owner may have tuned it, unless forced.

        Args:
            config: Text of `config.pbtxt`.
            force: Whether an existing version and configuration may be replaced.

        Raises:
            LayoutError: The version exists and `force` is off.
            OSError: Something cannot be written; the version is not published.
        """
        target = self._target.path
        target.parent.mkdir(exist_ok=True)
        config_path = target.parent / CONFIG_FILE
        wanted = config.encode()
        keep = config_path.exists() and not force
        staged = self._root / CONFIG_FILE
        staged.write_bytes(wanted)  # before the version is seen: a disk may fill

        if force and target.exists():
            target.rename(self._root / _REPLACED)
        try:
            self.path.rename(target)
        except OSError as error:
            if target.exists():  # `require_place` has not seen it, so it appeared meanwhile
                raise LayoutError(
                    f"{target}: another export published version {self._target.version} of "
                    f"{self._target.name} meanwhile; run this one again"
                ) from error
            raise
        if not keep:
            staged.replace(config_path)

    def close(self) -> None:
        """Clear away what was not published, and put back what it was to replace."""
        replaced = self._root / _REPLACED
        if replaced.exists() and not self._target.path.exists():
            replaced.rename(self._target.path)
        shutil.rmtree(self._root, ignore_errors=True)


def require_place(target: BundleFolder, *, force: bool) -> None:
    """Raise unless a version can be published at its place.

    Raises:
        LayoutError: The version exists and `force` is off, or something else is in the way.
    """
    model = target.path.parent
    for folder in (model.parent, model):
        if _is_taken(folder) and not folder.is_dir():
            raise LayoutError(f"{folder}: expected a folder, found a file; choose another --output")
    config = model / CONFIG_FILE
    if _is_taken(config) and not config.is_file():
        raise LayoutError(f"{config}: expected a file, found something else; move it away")
    if _is_taken(target.path) and not (force and target.path.is_dir()):
        raise LayoutError(
            f"{target.path}: version {target.version} of {target.name} exists; leave --version "
            "out for the next free one, or replace it with --force"
        )


def _is_taken(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a dangling link exists, too


@contextmanager
def staging(target: BundleFolder) -> Iterator[Staging]:
    """Open a place to write a version; whatever was not published is gone at the end.

    Args:
        target: Where the version shall be; `target.path` is REPOSITORY/NAME/VERSION.

    Yields:
        The staging, whose `path` exists and is empty.
    """
    repository = target.path.parent.parent
    made = [p for p in (repository, *repository.parents) if not p.exists()]
    try:
        repository.mkdir(parents=True, exist_ok=True)
        place = Staging(_make_hidden(repository), target)
        try:
            place.path.mkdir()
            yield place
        finally:
            place.close()
    finally:
        for folder in (target.path.parent, *made):
            with suppress(OSError):  # not empty, so it holds something: keep it
                folder.rmdir()


def _make_hidden(repository: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=".export-", dir=repository))
    except OSError as error:  # it names a folder that nobody has asked for
        raise OSError(error.errno, error.strerror, str(repository)) from error
