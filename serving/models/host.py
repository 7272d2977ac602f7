"""The models of this process: loaded, published and dropped as their lifecycle wants."""

import threading
from collections.abc import Callable

import structlog
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail, RuntimeException

from kan_bundle.errors import BundleError, ManifestError
from serving.errors import EngineError, StartupError
from serving.models.desired_state import LoadFailure, PinnedVersion, Plans
from serving.models.loading import LoadCancelled, LoadedModel, yield_gil
from serving.models.repository import Repository, Version

_log = structlog.get_logger()


class LocalHost:
    """A `ModelHost` in this process. One thread at a time may call it, except for `cancel`.

    Args:
        repository: What is served, for requests to read.
        load: Loads and verifies one version.
        on_change: Called when other versions are served than before.
        count_failure: Called for every load that failed.
    """

    def __init__(
        self,
        repository: Repository,
        load: Callable[[PinnedVersion], LoadedModel],
        on_change: Callable[[], None] = lambda: None,
        count_failure: Callable[[LoadFailure], None] = lambda failure: None,
    ) -> None:
        self._repository = repository
        self._load = load
        self._on_change = on_change
        self._count_failure = count_failure
        self._loaded: dict[str, dict[PinnedVersion, LoadedModel]] = {}
        self._cancelled = threading.Event()

    def step(self) -> None:
        """Let requests run for a moment between two steps of a load.

        Raises:
            LoadCancelled: No load is wanted any more.
        """
        if self._cancelled.is_set():
            raise LoadCancelled
        yield_gil()

    def cancel(self) -> None:
        """End loads that are under way, each after its step, and those to come."""
        self._cancelled.set()

    def load(self, version: PinnedVersion) -> LoadFailure | None:
        """Load and verify a version beside those that serve; return why it failed, if it did.

        Raises:
            StartupError: The provider is not available.
        """
        try:
            model = self._load(version)
        except StartupError:
            raise
        except LoadCancelled:
            return LoadFailure("the server stops", "the server is stopping", transient=True)
        except Exception as error:  # also what no check has foreseen
            failure = _failure(version, error)
            self._count_failure(failure)
            _log.error(
                "model_refused",
                model=version.name,
                version=version.version,
                reason=failure.reason,
                transient=failure.transient,
            )
            return failure
        self._loaded.setdefault(version.name, {})[version] = model
        _log.info(
            "model_ready",
            model=version.name,
            version=version.version,
            source_sha256=model.manifest.source and model.manifest.source.sha256,
            kan_layers=len(model.manifest.layers),
            fused_layers=model.engine.fused_layers,
            nodes=model.engine.placement,
        )
        return None

    def publish(self, name: str, plans: Plans) -> None:
        """Make a model what the plans say, at once, and drop versions that none pins."""
        loaded = self._loaded.get(name, {})
        before = self._repository.models.get(name, {})
        after = {
            number: Version(
                loaded[plan.pinned] if plan.pinned else None,
                plan.reason,
                plan.remedy,
                plan.loading,
                plan.unloaded,
            )
            for number, plan in plans.items()
        }
        self._repository.replace(name, after)
        if not any(plan.loading for plan in plans.values()):  # others may be about to be pinned
            pinned = {plan.pinned for plan in plans.values()}
            kept = {version: model for version, model in loaded.items() if version in pinned}
            self._loaded.pop(name, None)
            if kept:
                self._loaded[name] = kept
        for number, version in before.items():
            if version.model and (number not in after or after[number].model is None):
                _log.info("model_unloaded", model=name, version=number)
        self._on_change()

    def has(self, version: PinnedVersion) -> bool:
        """Whether a version is loaded."""
        return version in self._loaded.get(version.name, {})

    def set_failed(self, count: int) -> None:
        """Report how many versions of the repository have failed."""
        self._repository.failed = count


def _failure(version: PinnedVersion, error: Exception) -> LoadFailure:
    if isinstance(error, BundleError | EngineError):
        return LoadFailure(str(error), _public(error), _is_transient(error))
    reason = f"{version.path}: {type(error).__name__}: {error}; export again"
    return LoadFailure(reason, _public(error), transient=True)


def _is_transient(error: BaseException | None) -> bool:
    """Whether an error comes from the system: a disk, memory, a file that cannot be opened now."""
    while error is not None:
        if isinstance(error, OSError | MemoryError | EngineError | EPFail | RuntimeException):
            return not isinstance(error, FileNotFoundError)
        error = error.__cause__ or error.__context__
    return False


def _public(error: Exception) -> str:
    """Say why a version is not served without a path or another program's words."""
    if isinstance(error, ManifestError):
        return "its manifest cannot be read; the server's log says more"
    if isinstance(error, BundleError):
        return "it failed its checks at load; the server's log says more"
    return "it cannot be run here; the server's log says more"
