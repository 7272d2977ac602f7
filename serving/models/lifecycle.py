"""Which versions of each model are served: the desired state, decided in one place.

The lifecycle looks at the folders of the repository, applies the version policy, and pins each
version by the digest of its manifest. A host loads and serves what was decided: this process
(host.py) or all worker processes (serving/supervisor/). A version is loaded beside those that
serve; the model changes over once it is loaded everywhere. A version that fails is known with its
reason. It is loaded again when its files change, when a client asks, and, if the failure may have
been momentary, after a while. What served before goes on.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from kan_bundle.errors import BundleError, LayoutError
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
from kan_bundle.manifest import manifest_content
from serving.errors import ControlRefused, ModelNotFound, StartupError
from serving.models.desired_state import LoadFailure, ModelHost, PinnedVersion, Plans, VersionPlan
from serving.models.policy import Control, VersionPolicy
from serving.periodic import repeating

_Stamp = tuple[tuple[str, int, int, int], ...]

_MAX_FILES = 100  # of a version, which has about ten
_BUNDLE_FILES = (
    *(MANIFEST_FILE, SIGNATURE_FILE, MODEL_FILE, WEIGHTS_FILE),
    *(TORCHSCRIPT_FILE, GOLDEN_FILE, REPORT_FILE),
)
_OTHER_POLICY = "start the server with --version-policy all"
_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 300.0
_JOIN_S = 0.5  # for a step of a load that is under way; the process may end without it

_log = structlog.get_logger()


@dataclass(frozen=True)
class _Attempt:
    """The last attempt to load a version.

    Args:
        stamp: Of its files, as they were.
        pinned: What was loaded.
        failure: Why it failed; None if it did not.
        retry_s: How long to wait before the next attempt at the same files, in seconds.
        retry_at: When that is.
    """

    stamp: _Stamp
    pinned: PinnedVersion
    failure: LoadFailure | None
    retry_s: float
    retry_at: float


class ModelLifecycle:
    """Keeps the models of a repository as its folders and the policy want. Thread-safe.

    Args:
        root: Folder of the repository.
        policy: Which versions are served.
        host: Loads and serves them.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        root: Path,
        policy: VersionPolicy,
        host: ModelHost,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._policy = policy
        self._host = host
        self._clock = clock
        self._lock = threading.Lock()
        self._plans: dict[str, Plans] = {}
        self._attempts: dict[str, dict[int, _Attempt]] = {}
        self._count = 0  # attempts
        self._failed = 0
        self._skipped: set[Path] = set()
        self._closed = False

    @property
    def plans(self) -> dict[str, Plans]:
        """The desired state of every model, by name."""
        return dict(self._plans)

    def refresh(self, names: Collection[str] | None = None, *, retry: bool = False) -> None:
        """Look at the folders and serve what the policy wants of them.

        Args:
            names: Models to look at; None for all.
            retry: Whether to load versions again that have failed, at once.

        Raises:
            LayoutError: The repository's folder cannot be read; nothing changes.
            ModelNotFound: A model that was named has no folder.
            StartupError: The provider is not available.
        """
        with self._lock:
            self._refresh_all(names, retry)

    def retry(self) -> None:
        """Load versions again whose failure may have been momentary, and no others.

        Raises:
            LayoutError: The repository's folder cannot be read; nothing changes.
            StartupError: The provider is not available.
        """
        with self._lock:
            due = [
                name
                for name, attempts in self._attempts.items()
                if any(self._is_due(attempt) for attempt in attempts.values())
            ]
            if due:
                self._refresh_all(due, False, known_only=True)

    def start_over(self) -> None:
        """Decide anew what is served, because nothing of the desired state can be served.

        Raises:
            LayoutError: The repository's folder cannot be read.
            StartupError: The provider is not available.
        """
        with self._lock:
            names = list(self._plans)
            self._plans.clear()
            self._attempts.clear()
            self._refresh_all([name for name in names if (self._root / name).is_dir()], True)

    def load(self, name: str) -> None:
        """Serve the present content of a model's folder, because a client asks for it.

        Raises:
            ModelNotFound: There is no such model.
            ControlRefused: A version of it is not served, or the repository cannot be read; the
                message reveals nothing internal.
        """
        try:
            self.refresh([name], retry=True)
        except LayoutError as error:
            raise ControlRefused("the repository cannot be read; the server's log says more") from (
                error
            )
        failures = self.failures(name)
        if failures:
            newest = max(failures)
            raise ControlRefused(f"version {newest} of model {name!r}: {failures[newest]}")

    def unload(self, name: str) -> None:
        """Stop serving a model.

        Raises:
            ModelNotFound: There is no such model.
        """
        with self._lock:
            plans = self._plans.get(name)
            if plans is None:
                raise ModelNotFound(f"there is no model {name[:128]!r}")
            unloaded = VersionPlan(None, "it was unloaded", "have it loaded again", unloaded=True)
            self._publish(name, dict.fromkeys(plans, unloaded))
            self._attempts.pop(name, None)

    def failures(self, name: str) -> dict[int, str]:
        """Return why versions of a model have failed, as clients see it."""
        with self._lock:
            return {
                version: attempt.failure.public
                for version, attempt in self._attempts.get(name, {}).items()
                if attempt.failure is not None
            }

    def close(self) -> None:
        """Change nothing any more, and end loads that are under way."""
        self._closed = True
        self._host.cancel()

    def _refresh_all(
        self, names: Collection[str] | None, retry: bool, *, known_only: bool = False
    ) -> None:
        found: dict[str, list[BundleFolder]] = {}
        unreadable: set[str] = set()  # now; that says nothing of what is in there

        def skip(path: Path, reason: str) -> None:
            if path.parent == self._root:
                unreadable.add(path.name)
            if path not in self._skipped:
                self._skipped.add(path)
                _log.warning("folder_skipped", path=str(path), reason=reason)

        for folder in find_bundles(self._root, skip):
            if not known_only or folder.version in self._plans.get(folder.name, {}):
                found.setdefault(folder.name, []).append(folder)
        if names is None:
            names = {*found, *self._plans} - unreadable
        for name in sorted(names):
            if name in unreadable:
                raise LayoutError(f"{self._root / name}: cannot be read; try again")
            if name not in found and name not in self._plans:
                raise ModelNotFound(f"there is no model {name[:128]!r} in the repository")
            if self._closed:
                return
            self._refresh(name, found.get(name, []), retry)
        failed = sum(
            attempt.failure is not None
            for attempts in self._attempts.values()
            for attempt in attempts.values()
        )
        if failed != self._failed:
            self._failed = failed
            self._host.set_failed(failed)

    def _refresh(self, name: str, folders: list[BundleFolder], retry: bool) -> None:
        """Bring one model to what the policy wants, and change over to it at once."""
        plans: dict[int, VersionPlan] = {}
        served = 0
        for folder in sorted(folders, reverse=True):
            number = folder.version
            if self._policy.considers(number) and self._policy.wants_more(served):
                plans[number] = self._plan(folder, retry)
                served += plans[number].pinned is not None
            else:
                plans[number] = VersionPlan(
                    None, f"the version policy is {self._policy}", _OTHER_POLICY
                )
        self._publish(name, plans)
        kept = {
            number: attempt
            for number, attempt in self._attempts.pop(name, {}).items()
            if number in plans and (attempt.failure or plans[number].pinned)
        }
        if kept:
            self._attempts[name] = kept

    def _plan(self, folder: BundleFolder, retry: bool) -> VersionPlan:
        """Load the content of a folder, unless that was tried before."""
        plans = self._plans.get(folder.name, {})
        serving = plans[folder.version].pinned if folder.version in plans else None
        stamp = _stamp(folder.path)
        attempts = self._attempts.setdefault(folder.name, {})
        attempt = attempts.get(folder.version)
        if (
            attempt is None
            or attempt.stamp != stamp
            or (attempt.failure is not None and retry)
            or self._is_due(attempt)
        ):
            loading = VersionPlan(serving, loading=True)
            self._publish(folder.name, {**plans, folder.version: loading})
            attempt = attempts[folder.version] = self._try(folder, stamp, attempt)
        if attempt.failure is not None:
            return VersionPlan(serving, attempt.failure.public)  # what served goes on
        return VersionPlan(attempt.pinned)

    def _try(self, folder: BundleFolder, stamp: _Stamp, before: _Attempt | None) -> _Attempt:
        self._count += 1
        path = str(folder.path)
        pinned = PinnedVersion(folder.name, folder.version, path, _digest(folder.path), self._count)
        failure = self._host.load(pinned)
        retry_s = _FIRST_RETRY_S
        if before is not None and before.failure is not None and before.stamp == stamp:
            retry_s = min(2 * before.retry_s, _LONGEST_RETRY_S)
        return _Attempt(stamp, pinned, failure, retry_s, self._clock() + retry_s)

    def _is_due(self, attempt: _Attempt) -> bool:
        failure = attempt.failure
        return failure is not None and failure.transient and self._clock() >= attempt.retry_at

    def _publish(self, name: str, plans: Plans) -> None:
        if self._closed or self._plans.get(name, {}) == plans:
            return
        if plans:
            self._plans[name] = plans
        else:
            del self._plans[name]
        self._host.publish(name, plans)


def load_at_start(
    lifecycle: ModelLifecycle, root: Path, control: Control, names: Collection[str]
) -> None:
    """Serve the content of the repository before the port is taken.

    Args:
        lifecycle: Of the repository.
        root: Folder of the repository.
        control: When versions are looked for.
        names: Models to load if clients load the others.

    Raises:
        StartupError: There is nothing to serve, and no later look.
        LayoutError: The repository cannot be read.
    """
    found = find_bundles(root)
    if not found and (what := _enclosed(root)) is not None:
        raise StartupError(f"{root}: expected a model repository, found {what}")
    if control == "explicit":
        try:
            lifecycle.refresh(names)
        except ModelNotFound as error:
            raise StartupError(f"--load-models: {error}") from error
        return
    if control == "none" and not found:
        raise StartupError(
            f"{root}: no bundle found; expected MODEL/VERSION/ folders, as "
            f"`python -m export model.pt --output {root}` writes them"
        )
    lifecycle.refresh()


@contextmanager
def refreshing(lifecycle: ModelLifecycle, control: Control, seconds: float) -> Iterator[None]:
    """Look at the repository periodically, in a thread.

    With polling, folders are served as they change. Where clients load models, a failed load is
    theirs to repeat. Otherwise only what failed for a moment is loaded again.

    Args:
        lifecycle: Of the repository.
        control: When versions are looked for.
        seconds: From one look to the next.
    """

    def look() -> None:
        try:
            if control == "poll":
                lifecycle.refresh()
            else:
                lifecycle.retry()
        except (BundleError, StartupError, OSError) as error:
            _log.error("repository_unreadable", reason=str(error))

    with ExitStack() as cleanup:
        if control != "explicit":
            cleanup.enter_context(repeating("refresh", look, seconds, _JOIN_S))
        cleanup.callback(lifecycle.close)
        yield


def _enclosed(folder: Path) -> str | None:
    """Return what a folder inside of a repository is, and where the repository is."""
    places = ("a version", MANIFEST_FILE, "../.."), ("a model", f"*/{MANIFEST_FILE}", "..")
    for what, manifests, above in places:
        if any(folder.glob(manifests)):
            return f"{what}; its repository is {os.path.normpath(folder / above)}"
    return None


def _digest(folder: Path) -> str:
    with suppress(BundleError, OSError):  # which the load will report
        return hashlib.sha256(manifest_content(folder)).hexdigest()
    return ""


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
            if len(names) > _MAX_FILES:
                return _BUNDLE_FILES
    return names
