"""The models that are served: found, verified, replayed, and only then ready.

A version that fails any check is known but not ready; the others are served. This module knows
folders and engines, not gRPC.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kan_bundle.errors import BundleError, IntegrityError
from kan_bundle.golden import excess, read_golden, side_by_side
from kan_bundle.integrity import check_file, read_checked
from kan_bundle.layout import GOLDEN_FILE, MODEL_FILE, BundleFolder, find_bundles, parse_version
from kan_bundle.manifest import Manifest, read_manifest
from serving.engine import Engine
from serving.errors import EngineError, ModelNotFound, ModelNotReady, StartupError

EngineMaker = Callable[[bytes, Manifest, Path], Engine]
"""Makes an engine from verified bytes, what they are, and the folder of the rest."""


@dataclass(frozen=True)
class LoadedModel:
    """One version of a model that has passed every check."""

    manifest: Manifest
    engine: Engine


@dataclass(frozen=True)
class RefusedModel:
    """One version of a model that has not, and why. The reason is for the log, not for clients."""

    reason: str


ModelVersion = LoadedModel | RefusedModel


class Repository:
    """What was found in a model repository. It does not change.

    Args:
        models: Versions of each model, by name and number.
    """

    def __init__(self, models: Mapping[str, Mapping[int, ModelVersion]]) -> None:
        self._models = models

    @property
    def loaded(self) -> list[LoadedModel]:
        """List every version that can be served."""
        return [
            found
            for versions in self._models.values()
            for found in versions.values()
            if isinstance(found, LoadedModel)
        ]

    @property
    def ready(self) -> bool:
        """Whether at least one version of one model can be served."""
        return any(self._ready_versions(name) for name in self._models)

    def find(self, name: str, version: str) -> LoadedModel:
        """Find the version that answers a request.

        Args:
            name: Model name.
            version: A version's number in decimal, or empty for the newest that is ready.

        Raises:
            ModelNotFound: There is no such model or version.
            ModelNotReady: It is there, and was refused at load.
        """
        versions = self._versions(name)
        if version:
            number = parse_version(version)
            if number is None or number not in versions:
                raise ModelNotFound(
                    f"model {name!r} has no version {version[:32]!r}; "
                    f"it has {', '.join(map(str, sorted(versions)))}"
                )
        else:
            number = max(self._ready_versions(name), default=max(versions))
        found = versions[number]
        if isinstance(found, RefusedModel):
            raise ModelNotReady(
                f"version {number} of model {name!r} failed its checks at load and is not served; "
                "the server's log says why"
            )
        return found

    def ready_versions(self, name: str) -> list[int]:
        """List the versions of a model that can be served, ascending.

        Raises:
            ModelNotFound: There is no such model.
        """
        self._versions(name)
        return sorted(self._ready_versions(name))

    def _versions(self, name: str) -> Mapping[int, ModelVersion]:
        versions = self._models.get(name)
        if versions is None:
            raise ModelNotFound(f"there is no model {name[:128]!r}")
        return versions

    def _ready_versions(self, name: str) -> list[int]:
        return [n for n, found in self._models[name].items() if isinstance(found, LoadedModel)]


def load_repository(
    root: Path,
    make_engine: EngineMaker,
    on_version: Callable[[BundleFolder, ModelVersion], None],
    on_skipped: Callable[[Path, str], None] = lambda path, reason: None,
) -> Repository:
    """Load every bundle of a model repository.

    Args:
        root: The repository.
        make_engine: Makes an engine from verified bytes.
        on_version: Told the outcome for each version as it is known.
        on_skipped: Told of each folder that is no model and no version.

    Raises:
        LayoutError: The folder cannot be read.
        StartupError: There is no bundle in it, or the provider is not there.
    """
    folders = find_bundles(root, on_skipped)
    if not folders:
        raise StartupError(
            f"{root}: no bundle found; expected MODEL/VERSION/ folders, as "
            f"`python -m export model.pt --output {root}` writes them"
        )
    models: dict[str, dict[int, ModelVersion]] = {}
    for folder in folders:
        outcome = _load(folder, make_engine)
        models.setdefault(folder.name, {})[folder.version] = outcome
        on_version(folder, outcome)
    return Repository(models)


def _load(folder: BundleFolder, make_engine: EngineMaker) -> ModelVersion:
    """Load a bundle, or say why not: whatever is wrong with one never stops the others."""
    try:
        return load_bundle(folder, make_engine)
    except StartupError:
        raise
    except (BundleError, EngineError) as error:
        return RefusedModel(str(error))
    except Exception as error:  # what no check has foreseen
        return RefusedModel(f"{folder.path}: {type(error).__name__}: {error}; export again")


def load_bundle(folder: BundleFolder, make_engine: EngineMaker) -> LoadedModel:
    """Verify one bundle and replay its golden probes.

    Args:
        folder: Where it lies.
        make_engine: Makes an engine from verified bytes.

    Raises:
        BundleError: A file is missing, changed or unusable, or the answers are not the golden
            ones.
        EngineError: The model does not run.
    """
    manifest = read_manifest(folder.path)
    if (manifest.name, manifest.version) != (folder.name, folder.version):
        raise IntegrityError(
            f"{folder.path}: the manifest says model {manifest.name!r} version "
            f"{manifest.version}; a bundle cannot be renamed: export it again under this name"
        )
    for name, record in manifest.files.items():
        if name not in (MODEL_FILE, GOLDEN_FILE):  # those are hashed as they are read
            check_file(folder.path / name, record)
    model = read_checked(folder.path / MODEL_FILE, manifest.files[MODEL_FILE])
    content = read_checked(folder.path / GOLDEN_FILE, manifest.files[GOLDEN_FILE])
    engine = make_engine(model, manifest, folder.path)

    golden = read_golden(content, manifest.inputs)
    found = side_by_side(engine.run(golden.inputs))
    if found.shape != golden.outputs.shape:
        raise IntegrityError(
            f"{folder.path}: golden replay gave shape {found.shape}, expected "
            f"{golden.outputs.shape}; export again"
        )
    worst = float(excess(found, golden.outputs, golden.tolerance).max())
    if worst > 1.0:
        fused = ", with --fused" if engine.fused_layers else ""
        raise IntegrityError(
            f"{folder.path}: golden replay is off by {worst:.3g} times what is allowed on this "
            f"machine and provider{fused}; do not serve it: export again here and compare"
        )
    return LoadedModel(manifest, engine)
