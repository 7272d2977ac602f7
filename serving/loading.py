"""From a folder to a model that is ready: verified, loaded, its golden probes replayed.

Requests are answered meanwhile, and much of this holds the interpreter's lock, onnxruntime's part
for a millisecond or two. So it is done in steps, between which requests have the lock, and within
them Python gives it away as soon as somebody waits for it. This module knows bundles and engines,
not gRPC.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kan_bundle.errors import IntegrityError
from kan_bundle.golden import excess, read_golden, side_by_side
from kan_bundle.integrity import check_file, read_checked
from kan_bundle.layout import GOLDEN_FILE, MODEL_FILE, BundleFolder
from kan_bundle.manifest import Manifest, read_manifest
from serving.batching import Lane, Limits
from serving.dispatch import Arrays, Request
from serving.engine import Engine
from serving.grid import Grid
from serving.statistics import Statistics

_SWITCH_S = 1e-4
_BREATH_S = 2e-3  # longer than a request takes

EngineMaker = Callable[[bytes, Manifest, Path], Engine]
"""Makes an engine from verified bytes, what they are, and the folder of the rest."""


@dataclass(frozen=True)
class LoadedModel:
    """One version of a model that has passed every check.

    Args:
        manifest: What it is.
        engine: What runs it.
        lane: Where its requests wait.
        grid: Where it was trained; None if that cannot be told from its inputs.
        count: Told how many rows were run, and how many of them were outside of the grid.
        statistics: What it has answered.
    """

    manifest: Manifest
    engine: Engine
    lane: Lane[Request]
    grid: Grid | None
    count: Callable[[int, int], None]
    statistics: Statistics = field(default_factory=Statistics)

    def run(self, inputs: Arrays) -> Arrays:
        """Run some rows, of one request or of several, and count them."""
        started_ns = time.monotonic_ns()
        outputs = self.engine.run(inputs)
        self.statistics.count_run(len(inputs[0]), time.monotonic_ns() - started_ns)
        self.count(len(inputs[0]), self.grid.count_outside(inputs) if self.grid else 0)
        return outputs


def load_bundle(
    folder: BundleFolder,
    make_engine: EngineMaker,
    limits: Limits,
    count: Callable[[int, int], None] = lambda rows, outside: None,
) -> LoadedModel:
    """Verify one bundle and replay its golden probes.

    Args:
        folder: Where it lies.
        make_engine: Makes an engine from verified bytes.
        limits: Of its requests.
        count: Told of every row that is run later.

    Raises:
        BundleError: A file is missing, changed or unusable, or the answers are not the golden
            ones.
        EngineError: The model does not run.
    """
    with _giving_way():
        return _load(folder, make_engine, limits, count)


def breathe() -> None:
    """Let requests go on for a moment, between two steps of loading."""
    time.sleep(_BREATH_S)


@contextmanager
def _giving_way() -> Iterator[None]:
    """Have threads that wait for the interpreter's lock wait a fiftieth of what they usually do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _load(
    folder: BundleFolder,
    make_engine: EngineMaker,
    limits: Limits,
    count: Callable[[int, int], None],
) -> LoadedModel:
    manifest = read_manifest(folder.path)
    breathe()
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
    breathe()
    engine = make_engine(model, manifest, folder.path)
    breathe()
    golden = read_golden(content, manifest.inputs)
    breathe()
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
    grid = Grid(manifest.input_range) if manifest.input_range else None
    return LoadedModel(manifest, engine, Lane(limits), grid, count)
