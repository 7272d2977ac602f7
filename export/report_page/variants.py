"""The same checkpoint in other precisions, among the versions of a model in the repository."""

from kan_bundle.errors import BundleError
from kan_bundle.layout import BundleFolder, parse_version
from kan_bundle.manifest import Manifest, Precision, PruningRecord, Source, read_manifest

_MOST = 64  # versions that are looked at, the newest ones


def find_variants(
    folder: BundleFolder,
    source: Source | None,
    precision: Precision,
    pruning: PruningRecord | None = None,
) -> tuple[Manifest, ...]:
    """Find the newest version in each other precision.

    Args:
        folder: Of the version that is being written.
        source: Its checkpoint; a module that was exported from Python has none, and no variants.
        precision: Its own, of which no other version is told.
        pruning: What was left out of it; a version with other edges is another function.
    """
    model = folder.path.parent
    if source is None or not model.is_dir():
        return ()
    versions = sorted((parse_version(entry.name) or 0 for entry in model.iterdir()), reverse=True)
    found: dict[Precision, Manifest] = {}
    for version in versions[:_MOST]:
        if version in (0, folder.version):
            continue
        try:
            manifest = read_manifest(model / str(version))
        except BundleError:  # somebody else's, or damaged: it is no variant
            continue
        same = manifest.source is not None and manifest.source.sha256 == source.sha256
        if same and _threshold(manifest.pruning) == _threshold(pruning):
            found.setdefault(manifest.precision, manifest)
    found.pop(precision, None)
    return tuple(found.values())


def _threshold(pruning: PruningRecord | None) -> float | None:
    return None if pruning is None else pruning.threshold
