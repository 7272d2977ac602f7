"""Where things lie in a model repository, and how a version gets there whole or not at all.

    models/               the repository
      digits/             one model
        config.pbtxt      what Triton needs to serve the same folder
        1/                one version, a positive integer: a bundle
          model.onnx, model.ts, golden.npz, manifest.json

A version is written into a hidden folder inside the repository, so on the same file system, and
renamed into place when it is complete. Readers pass over hidden folders.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kan_bundle.errors import LayoutError

MODEL_FILE = "model.onnx"
TORCHSCRIPT_FILE = "model.ts"
GOLDEN_FILE = "golden.npz"
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.pbtxt"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


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


def parse_version(text: str) -> int | None:
    """Read a version folder's name; None when it is not a positive integer as we write them."""
    return int(text) if _VERSION.fullmatch(text) else None


def find_bundles(repository: Path) -> list[BundleFolder]:
    """List every version folder of every model, by name and version. Hidden folders are skipped.

    Raises:
        LayoutError: The repository is not a folder that can be read.
    """
    try:
        return sorted(
            BundleFolder(model.name, version, folder)
            for model in repository.iterdir()
            if model.is_dir() and not model.name.startswith(".")
            for folder in model.iterdir()
            if folder.is_dir() and (version := parse_version(folder.name)) is not None
        )
    except OSError as error:
        raise LayoutError(
            f"{repository}: cannot be read as a model repository: {error.strerror}; expected a "
            "folder of MODEL/VERSION/ folders, as `python -m export` writes them"
        ) from error


def next_version(repository: Path, name: str) -> int:
    """Give the number after a model's highest version, 1 for a new model."""
    model = repository / name
    taken = [parse_version(entry.name) or 0 for entry in model.iterdir()] if model.is_dir() else []
    return max(taken, default=0) + 1


class Staging:
    """A version being written. `path` is its folder; nothing is seen of it until `publish`."""

    def __init__(self, root: Path, target: BundleFolder) -> None:
        self.path = root / str(target.version)
        self._root = root
        self._target = target

    def publish(self, config: str, *, force: bool) -> bool:
        """Move the version into the repository.

        An existing `config.pbtxt` is kept, because its owner may have tuned it, unless forced.

        Args:
            config: Text of `config.pbtxt`.
            force: Whether an existing version and configuration may be replaced.

        Returns:
            Whether a different `config.pbtxt` was there and kept.

        Raises:
            LayoutError: The version exists and `force` is off.
        """
        target = self._target.path
        target.parent.mkdir(exist_ok=True)
        config_path = target.parent / CONFIG_FILE
        keep = config_path.exists() and not force
        differs = keep and config_path.read_text(encoding="utf-8") != config
        staged = self._root / CONFIG_FILE
        staged.write_text(config, encoding="utf-8")  # before the version is seen: a disk may fill

        replaced = self._root / "replaced"
        if force and target.exists():
            target.rename(replaced)
        try:
            self.path.rename(target)
        except OSError as error:
            if replaced.exists():
                replaced.rename(target)
            refuse_existing(self._target, force=False, cause=error)
            raise
        if not keep:
            staged.replace(config_path)
        return differs


def refuse_existing(
    target: BundleFolder, *, force: bool, cause: BaseException | None = None
) -> None:
    """Raise unless the version's place is free, or may be replaced.

    Raises:
        LayoutError: The version exists and `force` is off.
    """
    if target.path.exists() and not force:
        raise LayoutError(
            f"{target.path}: version {target.version} of {target.name} exists; leave --version "
            "out for the next free one, or replace it with --force"
        ) from cause


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
    repository.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix=".export-", dir=repository))
    try:
        place = Staging(root, target)
        place.path.mkdir()
        yield place
    finally:
        shutil.rmtree(root, ignore_errors=True)
        for folder in (target.path.parent, *made):
            with suppress(OSError):  # not empty, so it holds something: keep it
                folder.rmdir()
