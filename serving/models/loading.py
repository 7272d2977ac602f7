"""From a folder to a model that is ready: verified, loaded, its golden probes replayed.

The order is that of trust: who signed the manifest, where that is asked for; the manifest; the
files it lists, by size and hash; the graph; and only then onnxruntime, with the very bytes that
were checked, and at last the answers.

Requests are answered meanwhile, and much of this holds the interpreter's lock, onnxruntime's part
for a millisecond or two. So it is done in steps, between which requests have the lock, and within
them Python gives it away as soon as somebody waits for it. This module knows bundles and engines,
not gRPC.
"""

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kan_bundle.errors import IntegrityError
from kan_bundle.golden import excess, read_golden, side_by_side
from kan_bundle.integrity import check_file, read_checked, read_chunks
from kan_bundle.layout import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE, BundleFolder
from kan_bundle.manifest import FileRecord, Manifest, manifest_content, parse_manifest
from kan_bundle.signature import PublicKey, require_listed, signed_files
from serving.batching import Lane, Limits
from serving.dispatch import Arrays, Request
from serving.engine import Engine
from serving.grid import Grid
from serving.infer_request import RequestReader
from serving.models.graph import check_graph
from serving.observability.statistics import Statistics
from serving.value_rules import ValueRules, value_rules

_SWITCH_S = 1e-4
_BREATH_S = 2e-3  # longer than a request takes

EngineMaker = Callable[[bytes, Manifest, Path], Engine]
"""Makes an engine from verified bytes, what they are, and the folder of the rest."""

Count = Callable[[int, int | None], None]
"""Told how many rows were run, and how many of them were outside of the grid; None of no grid."""


@dataclass(frozen=True)
class Admission:
    """What a bundle must be before it is loaded.

    Args:
        max_file_bytes: Size of its largest file.
        signer: Whose signature it must have; None asks for none.
    """

    max_file_bytes: int = 2**32
    signer: PublicKey | None = None


ANYBODYS = Admission()
"""A bundle that nobody needs to have signed."""


@dataclass(frozen=True)
class LoadedModel:
    """One version of a model that has passed every check.

    Args:
        manifest: What it is.
        engine: What runs it.
        lane: Where its requests wait.
        grid: Where it was trained; None if that cannot be told from its inputs.
        value_rules: Which values its inputs accept; None if all.
        count: Told of every row that is run.
        folder: Where it was loaded from. What lies there may have changed since.
        statistics: Of what it has answered.
        reader: Of its requests.
    """

    manifest: Manifest
    engine: Engine
    lane: Lane[Request]
    grid: Grid | None
    value_rules: ValueRules | None
    count: Count
    folder: Path
    statistics: Statistics
    reader: RequestReader

    def run(self, inputs: Arrays) -> Arrays:
        """Run some rows, of one request or of several, and count them."""
        started = time.perf_counter()
        outputs = self.engine.run(inputs)
        self.statistics.count_run(len(inputs[0]), time.perf_counter() - started)
        self.count(len(inputs[0]), self.grid.count_outside(inputs) if self.grid else None)
        return outputs


class LoadCancelled(Exception):
    """A load was ended because its model is not wanted any more."""


def yield_gil() -> None:
    """Let requests run for a moment, between two steps of a load."""
    time.sleep(_BREATH_S)


def load_bundle(
    folder: BundleFolder,
    make_engine: EngineMaker,
    limits: Limits,
    count: Count = lambda rows, outside: None,
    admission: Admission = ANYBODYS,
    *,
    digest: str = "",
    step: Callable[[], None] = yield_gil,
) -> LoadedModel:
    """Verify one bundle and replay its golden probes.

    Args:
        folder: Where it lies.
        make_engine: Makes an engine from verified bytes.
        limits: Of its requests.
        count: Told of every row that is run later.
        admission: What it must be.
        digest: SHA-256 that its manifest must have; any if empty.
        step: Called between two steps; what it raises ends the load.

    Raises:
        BundleError: It is not signed as it must be, its manifest is another, a file is missing,
            changed, too large or unusable, the graph asks for what is not loaded, or the answers
            are not the golden ones.
        EngineError: The model does not run.
    """
    with _giving_way():
        return _load(folder, make_engine, limits, count, admission, digest, step)


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
    count: Count,
    admission: Admission,
    digest: str,
    step: Callable[[], None],
) -> LoadedModel:
    raw = manifest_content(folder.path)
    found = hashlib.sha256(raw).hexdigest()
    if digest not in ("", found):
        raise IntegrityError(
            f"{folder.path / MANIFEST_FILE}: expected SHA-256 {digest}, found {found}: it changed "
            "since this version was chosen; put it back, or export it as another version"
        )
    signer = admission.signer
    signed = None if signer is None else signed_files(folder.path, raw, signer)
    manifest = parse_manifest(raw, folder.path)
    if signed is not None:
        require_listed(folder.path, manifest, signed)
    step()
    if (manifest.name, manifest.version) != (folder.name, folder.version):
        raise IntegrityError(
            f"{folder.path}: the manifest says model {manifest.name!r} version "
            f"{manifest.version}, the folder model {folder.name!r} version {folder.version}; a "
            "bundle cannot be renamed: export it again under this name, or move it back"
        )
    _require_sizes(folder.path, manifest, admission.max_file_bytes)
    weights = manifest.files.get(WEIGHTS_FILE)
    copied = signed is not None and weights is not None
    for name, record in manifest.files.items():
        # Some are hashed as they are read.
        if name not in (MODEL_FILE, GOLDEN_FILE) and not (copied and name == WEIGHTS_FILE):
            check_file(folder.path / name, record)
    model = read_checked(folder.path / MODEL_FILE, manifest.files[MODEL_FILE])
    content = read_checked(folder.path / GOLDEN_FILE, manifest.files[GOLDEN_FILE])
    step()
    check_graph(model, None if weights is None else weights.size_bytes)
    step()
    with _own_weights(folder.path, weights if copied else None) as place:
        engine = make_engine(model, manifest, place)
    step()
    golden = read_golden(content, manifest.inputs)
    step()
    answers = side_by_side(engine.run(golden.inputs))
    if answers.shape != golden.outputs.shape:
        raise IntegrityError(
            f"{folder.path}: golden replay gave shape {answers.shape}, expected "
            f"{golden.outputs.shape}; export again"
        )
    worst = float(excess(answers, golden.outputs, golden.tolerance).max())
    if worst > 1.0:
        fused = ", with --fused" if engine.fused_layers else ""
        raise IntegrityError(
            f"{folder.path}: golden replay is off by {worst:.3g} times what is allowed on this "
            f"machine and provider{fused}; do not serve it: export again here and compare"
        )
    grid = Grid(manifest.input_range) if manifest.input_range else None
    statistics = Statistics(manifest.name, manifest.version)
    rules = value_rules(manifest.inputs)
    reader = RequestReader(manifest, rules)
    return LoadedModel(
        *(manifest, engine, Lane(limits), grid, rules, count, folder.path, statistics, reader)
    )


def _require_sizes(folder: Path, manifest: Manifest, most: int) -> None:
    """Refuse a file that is too large, before it is opened.

    Raises:
        IntegrityError: There is one.
    """
    for name, record in manifest.files.items():
        if record.size_bytes > most:
            raise IntegrityError(
                f"{folder / name}: expected at most {most} bytes, found {record.size_bytes}; start "
                "again with a larger --max-model-bytes if it is to be served"
            )


@contextmanager
def _own_weights(folder: Path, record: FileRecord | None) -> Iterator[Path]:
    """Give the folder for onnxruntime to read weights from, which nobody else can write to.

    onnxruntime opens the file of the weights itself, after it was hashed, and goes on reading it
    as long as the model is served. So where it matters who wrote a bundle, it gets a copy, which
    leaves the disk when the model is unloaded.

    Args:
        folder: Of the version.
        record: Of the file, if it is to be copied.

    Raises:
        IntegrityError: It is missing or differs, or there is no room for the copy.
    """
    if record is None:
        yield folder
        return
    with ExitStack() as cleanup:
        try:  # for this user alone
            place = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="kanserve-")))
            with (place / WEIGHTS_FILE).open("xb") as copy:
                for chunk in read_chunks(folder / WEIGHTS_FILE, record):
                    copy.write(chunk)
        except OSError as error:
            raise IntegrityError(
                f"{folder / WEIGHTS_FILE}: cannot be copied for this server alone: "
                f"{error.strerror}; weights of a signed version are read from a copy: set TMPDIR "
                f"to a folder with {record.size_bytes} bytes of room"
            ) from error
        yield place
