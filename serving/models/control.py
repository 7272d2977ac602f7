"""Which versions are served: what lies in the repository's folders, the policy, and who may ask.

A version is loaded and verified beside those that serve. Only when that is done does the model
change over to it, at once. One that fails is known with its reason and tried again when its files
change; what served before goes on.
"""

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from kan_bundle.errors import BundleError, LayoutError, ManifestError
from kan_bundle.layout import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    REPORT_FILE,
    SIGNATURE_FILE,
    TORCHSCRIPT_FILE,
    WEIGHTS_FILE,
    BundleFolder,
    find_bundles,
)
from serving.errors import ControlRefused, EngineError, ModelNotFound, StartupError
from serving.models.loading import LoadedModel
from serving.models.policy import VersionPolicy
from serving.models.repository import Repository, Version


@dataclass(frozen=True)
class Refusal:
    """A version that has failed.

    Args:
        reason: For the log.
        public: For clients; it reveals nothing internal.
    """

    reason: str
    public: str


Outcome = LoadedModel | Refusal
_Stamp = tuple[tuple[str, int, int, int], ...]

_MOST_FILES = 100  # of a version, which has about ten
_BUNDLE_FILES = (
    *(MANIFEST_FILE, SIGNATURE_FILE, MODEL_FILE, WEIGHTS_FILE),
    *(TORCHSCRIPT_FILE, GOLDEN_FILE, REPORT_FILE),
)
_OTHER_POLICY = "start the server with --version-policy all"

_log = structlog.get_logger()


class Keeper:
    """Keeps a repository as its folders and the policy want it. Safe to call from several threads.

    Args:
        root: The folder of the repository.
        repository: What is served.
        policy: Which versions are.
        load: Loads and verifies a bundle.
        on_change: Called when other versions are served than before.
    """

    def __init__(
        self,
        root: Path,
        repository: Repository,
        policy: VersionPolicy,
        load: Callable[[BundleFolder], LoadedModel],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._root = root
        self._repository = repository
        self._policy = policy
        self._load = load
        self._on_change = on_change
        self._lock = threading.Lock()
        self._tried: dict[str, dict[int, tuple[_Stamp, Outcome]]] = {}  # by name and version
        self._skipped: set[Path] = set()

    def refresh(self, names: Collection[str] | None = None) -> None:
        """Look at the folders and serve what the policy wants of them.

        Args:
            names: Of these models; of all if None.

        Raises:
            LayoutError: The repository's folder cannot be read; all stays as it is.
            ModelNotFound: A model that was named has no folder.
            StartupError: The provider is not there.
        """
        with self._lock:
            found: dict[str, list[BundleFolder]] = {}
            for folder in find_bundles(self._root, self._skip):
                found.setdefault(folder.name, []).append(folder)
            if names is None:
                names = {*found, *self._repository.models, *self._tried}
            for name in sorted(names):
                known = name in self._repository.models or name in self._tried
                if name not in found and not known:
                    raise ModelNotFound(f"there is no model {name[:128]!r} in the repository")
                self._refresh(name, found.get(name, []))
            self._repository.failed = sum(
                isinstance(outcome, Refusal)
                for tried in self._tried.values()
                for _, outcome in tried.values()
            )

    def load(self, name: str) -> None:
        """Serve what lies in a model's folder now, because a client asks for it.

        Raises:
            ModelNotFound: There is no such model.
            ControlRefused: A version of it is not served, or the repository cannot be read; the
                message reveals nothing internal.
        """
        try:
            self.refresh([name])
        except LayoutError as error:
            raise ControlRefused("the repository cannot be read; the server's log says more") from (
                error
            )
        failed = self.refused(name)
        if failed:
            newest = max(failed)
            raise ControlRefused(f"version {newest} of model {name!r}: {failed[newest]}")

    def unload(self, name: str) -> None:
        """Serve no version of a model any longer.

        Raises:
            ModelNotFound: There is no such model.
        """
        with self._lock:
            versions = self._repository.models.get(name)
            if versions is None:
                raise ModelNotFound(f"there is no model {name[:128]!r}")
            unloaded = Version(None, "it was unloaded", "have it loaded again", unloaded=True)
            self._publish(name, dict.fromkeys(versions, unloaded))
            self._tried.pop(name, None)

    def refused(self, name: str) -> dict[int, str]:
        """List the versions of a model that have failed, with what clients are told of it."""
        with self._lock:
            return {
                version: outcome.public
                for version, (_, outcome) in self._tried.get(name, {}).items()
                if isinstance(outcome, Refusal)
            }

    def _refresh(self, name: str, folders: list[BundleFolder]) -> None:
        """Bring one model to what the policy wants, and change over to it at once."""
        after: dict[int, Version] = {}
        served = 0
        for folder in sorted(folders, reverse=True):
            number = folder.version
            if self._policy.considers(number) and self._policy.wants_more(served):
                after[number] = self._version(folder)
                served += after[number].model is not None
            else:
                after[number] = Version(
                    None, f"the version policy is {self._policy}", _OTHER_POLICY
                )
        self._publish(name, after)

    def _version(self, folder: BundleFolder) -> Version:
        """Load what lies in a folder, unless that was tried before."""
        versions = self._repository.models.get(folder.name, {})
        serving = versions[folder.version].model if folder.version in versions else None
        stamp = _stamp(folder.path)
        tried = self._tried.setdefault(folder.name, {})
        if folder.version not in tried or tried[folder.version][0] != stamp:
            loading = {**versions, folder.version: Version(serving, loading=True)}
            self._repository.replace(folder.name, loading)
            tried[folder.version] = stamp, self._try(folder)
            _log_outcome(folder, tried[folder.version][1])
        outcome = tried[folder.version][1]
        if isinstance(outcome, Refusal):
            return Version(serving, outcome.public)  # what served goes on
        return Version(outcome)

    def _try(self, folder: BundleFolder) -> Outcome:
        """Load a bundle, or say why not: whatever is wrong with one never stops the others."""
        try:
            return self._load(folder)
        except StartupError:
            raise
        except (BundleError, EngineError) as error:
            return Refusal(str(error), _public(error))
        except Exception as error:  # what no check has foreseen
            reason = f"{folder.path}: {type(error).__name__}: {error}; export again"
            return Refusal(reason, _public(error))

    def _skip(self, path: Path, reason: str) -> None:
        """Say once that a folder is passed over."""
        if path not in self._skipped:
            self._skipped.add(path)
            _log.warning("folder_skipped", path=str(path), reason=reason)

    def _publish(self, name: str, after: Mapping[int, Version]) -> None:
        """Change a model over, and let go of what is not served any longer."""
        before = self._repository.models.get(name, {})
        self._repository.replace(name, after)
        for number, version in before.items():
            if version.model and (number not in after or after[number].model is None):
                _log.info("model_unloaded", model=name, version=number)
        self._on_change()
        kept = {
            number: (stamp, outcome)
            for number, (stamp, outcome) in self._tried.pop(name, {}).items()
            if number in after and (isinstance(outcome, Refusal) or after[number].model)
        }
        if kept:
            self._tried[name] = kept


@contextmanager
def polling(keeper: Keeper, seconds: float) -> Iterator[None]:
    """Refresh again and again, in a thread.

    Args:
        keeper: What is to refresh.
        seconds: From one look to the next.
    """
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(seconds):
            try:
                keeper.refresh()
            except (BundleError, StartupError) as error:
                _log.error("repository_unreadable", reason=str(error))

    thread = threading.Thread(target=look, name="poll", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _log_outcome(folder: BundleFolder, outcome: Outcome) -> None:
    log = _log.bind(model=folder.name, version=folder.version)
    if isinstance(outcome, Refusal):
        log.error("model_refused", reason=outcome.reason)
    else:
        log.info(
            "model_ready",
            source_sha256=outcome.manifest.source and outcome.manifest.source.sha256,
            kan_layers=len(outcome.manifest.layers),
            fused_layers=outcome.engine.fused_layers,
            nodes=outcome.engine.placement,
        )


def _stamp(folder: Path) -> _Stamp:
    """Take what changes when any file of a folder does."""
    found = []
    with suppress(OSError):
        for name in _names(folder):
            with suppress(OSError):
                status = (folder / name).stat()
                found.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(found))


def _names(folder: Path) -> Collection[str]:
    """List the files of a folder; if it holds too many, only those that every bundle may have."""
    names = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            names.add(entry.name)
            if len(names) > _MOST_FILES:
                return _BUNDLE_FILES
    return names


def _public(error: Exception) -> str:
    """Say why a version is not served without a path or another program's words."""
    if isinstance(error, ManifestError):
        return "its manifest cannot be read; the server's log says more"
    if isinstance(error, BundleError):
        return "it failed its checks at load; the server's log says more"
    return "it cannot be run here; the server's log says more"
