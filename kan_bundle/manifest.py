"""manifest.json: what the exporter promises and the server relies on.

The file ends with a digest of its own bytes, taken with the digest left empty, so that a changed
byte anywhere in it is noticed. The digest, like the hashes, guards against accidents, not against
someone who can write to the repository: against that a bundle is signed (kan_bundle/signature.py).
"""

import hashlib
import json
import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from kan_bundle.errors import ManifestError
from kan_bundle.layout import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE, open_regular
from kan_bundle.scores import ExpectedRecord, TargetsRecord

FORMAT: Literal[2] = 2
"""Version of the bundle's format that is written."""

READABLE_FORMATS = (1, 2)
"""Versions that are read. Format 1 has no rules for the values of inputs."""

_STRICT = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
_LARGEST = 16 * 2**20  # bytes; two numbers per input feature are the most of it
_SMALLER = "export a network with fewer input features, layers or tensors"
_LARGEST_REST = 2 * 2**20  # bytes without those numbers
_MOST_PARTS = 100_000  # objects and arrays in it; of what is in one of them, but for those numbers
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_Count = Annotated[int, Field(ge=1)]


Datatype = Literal["FP32", "INT64", "INT32", "UINT8", "BOOL"]
DATATYPES: dict[Datatype, type[np.generic]] = {
    "FP32": np.float32,
    "INT64": np.int64,
    "INT32": np.int32,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
"""The Open Inference Protocol's names of the element types that are offered, and numpy's types."""

Form = Literal["cardinal", "recursion"]
"""How a file computes a basis: in closed form for equally spaced knots, or by Cox-de Boor."""

Precision = Literal["fp32", "fp16", "bf16", "int8"]
"""What KANLinear layers' weights are stored and multiplied in."""


@_STRICT
@dataclass(frozen=True)
class TensorSpec:
    """An input or output tensor.

    Attributes:
        name: Name on the wire and in the graph.
        datatype: One of `DATATYPES`.
        shape: Dimensions; -1 stands for the batch, which comes first.
        allowed: Smallest and largest whole number that the network accepts in this input; None
            accepts every number of the datatype. Never set for an output.
        rejects_nan: Whether a row with NaN in this input must be rejected, because a runtime would
            answer it with a plausible number where the network does not.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
    datatype: Datatype
    shape: Annotated[tuple[int, ...], Field(min_length=1, fail_fast=True)]
    allowed: tuple[int, int] | None = None
    rejects_nan: bool = False


_Tensors = Annotated[tuple[TensorSpec, ...], Field(min_length=1)]


@_STRICT
@dataclass(frozen=True)
class LayerRecord:
    """One KANLinear.

    Attributes:
        name: Its name in the network.
        in_features: Width of the input.
        out_features: Width of the output.
        grid_size: G, the number of grid intervals.
        spline_order: k, the polynomial degree.
        grid: `uniform` if the knots of every feature are equally spaced, else `adapted`.
        standalone_scaler: Whether the checkpoint had a scale per edge.
        base_activation: As `--activation` names it.
        lowering: How the file computes the basis.
        lowering_error: Largest |y - y64| of the layer in that form, in float32, within its knots,
            at up to 64 of its outputs.
        eager_error: The same of the layer as it was trained.
        operator: The operator of kan_ops that the layer is one node of, with a body of standard
            operators; None if it is written as those alone.
    """

    name: str
    in_features: _Count
    out_features: _Count
    grid_size: _Count
    spline_order: Annotated[int, Field(ge=0)]
    grid: Literal["uniform", "adapted"]
    standalone_scaler: bool
    base_activation: str
    lowering: Form
    lowering_error: Annotated[float, Field(ge=0)]
    eager_error: Annotated[float, Field(ge=0)]
    operator: str | None = None


@_STRICT
@dataclass(frozen=True)
class InputRange:
    """Ends of the first layer's grid, per input feature, where the splines were trained."""

    low: Annotated[tuple[float, ...], Field(fail_fast=True)]
    high: Annotated[tuple[float, ...], Field(fail_fast=True)]


@_STRICT
@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: _Sha256


@_STRICT
@dataclass(frozen=True)
class Source:
    """The checkpoint: its file name, without folders, and its SHA-256."""

    file: str
    sha256: _Sha256


@_STRICT
@dataclass(frozen=True)
class ParityRecord:
    """How far a runtime was from the reference.

    Attributes:
        runtime: What ran.
        max_absolute: Largest |y - y64|.
        max_relative: Largest |y - y64| / max(1, |y64|).
        max_ulp: Largest |y - y64| in float32 units in the last place of y64.
        tolerance: Allowed share of an output's size, or of y64 if that is more (below float32: of
            what the output is made of, at inputs far from ordinary); where the eager float32 model
            is further off than that, twice its own error is allowed.
        excess: Largest |y - y64| as a share of what was allowed at that output; at most 1.
        probes: Number of input rows compared, over all batch sizes.
        same_argmax: Share of the ordinary rows whose largest output is the same as the
            reference's; None unless there is one output of several numbers.
    """

    runtime: str
    max_absolute: float
    max_relative: float
    max_ulp: float
    tolerance: float
    excess: Annotated[float, Field(ge=0, le=1)]
    probes: _Count
    same_argmax: Annotated[float, Field(ge=0, le=1)] | None


@_STRICT
@dataclass(frozen=True)
class PrunedLayer:
    """What pruning left of a KANLinear.

    Attributes:
        name: Its name in the network.
        edges: Of the checkpoint's layer, inputs times outputs.
        zeroed: Those of them that have no weight in the files.
        already: Those of `zeroed` that had none in the checkpoint either.
    """

    name: str
    edges: _Count
    zeroed: Annotated[int, Field(ge=0)]
    already: Annotated[int, Field(ge=0)] = 0


@_STRICT
@dataclass(frozen=True)
class ChangeRecord:
    """How far the answers of a pruned or quantised network are from the checkpoint's.

    Both are in float64, or in float32 if the network cannot run in float64.

    Attributes:
        on: The rows: samples that were given, random ones within the first layer's grid, or, of a
            network whose inputs do not reach such a layer, just random ones.
        rows: Number of them.
        largest: Largest change of an output.
        typical: Root mean square of all changes.
        size: Root mean square of the outputs before.
        same_argmax: Share of the rows whose largest output is the same as before; None unless
            there is one output of several numbers.
    """

    on: Literal["samples", "grid", "random"]
    rows: _Count
    largest: Annotated[float, Field(ge=0)]
    typical: Annotated[float, Field(ge=0)]
    size: Annotated[float, Field(ge=0)]
    same_argmax: Annotated[float, Field(ge=0, le=1)] | None


@_STRICT
@dataclass(frozen=True)
class PruningRecord:
    """Edges that were left out on request: the bundle computes another function than its source.

    Attributes:
        threshold: Edges whose importance is at most this share of the largest in their layer were
            left out.
        layers: What is left of each KANLinear, in the network's order.
        nodes_removed: Of a KAN: inputs, nodes of each hidden layer and outputs that the files do
            without. The tensors of the model keep their shapes.
        change: What that changed, at some rows; elsewhere it may be more.
    """

    threshold: Annotated[float, Field(ge=0, lt=1)]
    layers: tuple[PrunedLayer, ...]
    nodes_removed: Annotated[tuple[int, ...], Field(fail_fast=True)] | None
    change: ChangeRecord

    @property
    def edges(self) -> int:
        """Edges of the checkpoint's layers."""
        return sum(layer.edges for layer in self.layers)

    @property
    def zeroed(self) -> int:
        """Those of them that have no weight in the files."""
        return sum(layer.zeroed for layer in self.layers)

    @property
    def already(self) -> int:
        """Those of `zeroed` that had none in the checkpoint either."""
        return sum(layer.already for layer in self.layers)


@_STRICT
@dataclass(frozen=True)
class Manifest:
    """The contract between export and serving.

    Attributes:
        format: One of `READABLE_FORMATS`.
        name: Model name, also its folder's.
        version: Model version, also its folder's.
        created: Time of export, UTC, ISO 8601.
        source: The checkpoint; None for a module exported from Python.
        layers: The KANLinear layers, in the network's order.
        precision: Of these layers' weights and products.
        input_range: Where the first layer's splines were trained, if the inputs reach it as they
            are; else None.
        inputs: Input tensors, in the network's order.
        outputs: Output tensors, in the network's order.
        reference: Precision of the answers that parity was measured against: the network's own in
            float64, or in float32 if it cannot run in float64.
        files: Every file of the version folder but the manifest and its signature.
        parity: One record per runtime.
        versions: Versions of the programs that took part, by name.
        pruning: What was left out of the source; None if nothing was. Parity is then that with the
            pruned network.
        approximation: Distance of the quantised network from the one in float32 (the pruned one, if
            edges were left out); None in fp32. Parity is then that with the quantised network.
        activation_assumed: Whether the base activation is a default that neither the file nor its
            user has named, and no expected answers have confirmed.
        lossy_operators: Operators of the ONNX file that onnxruntime answers NaN in with numbers, as
            `MaxPool (features.2)`. Rows with NaN are then answered by NaN, by a guard in the graph,
            or must be rejected, as the inputs say.
        torchscript_omitted: Why the bundle has no TorchScript file; None if it has one.
        expected: The answers that the network was compared with; None if none were given.
        targets: What checkpoint and files were scored by, an output each.
    """

    format: Literal[1, 2]
    name: str
    version: _Count
    created: str
    source: Source | None
    layers: tuple[LayerRecord, ...]
    precision: Precision
    input_range: InputRange | None
    inputs: _Tensors
    outputs: _Tensors
    reference: Literal["float64", "float32"]
    files: dict[_FileName, FileRecord]
    parity: tuple[ParityRecord, ...]
    versions: dict[str, str]
    pruning: PruningRecord | None = None
    approximation: ChangeRecord | None = None
    activation_assumed: bool = False
    lossy_operators: Annotated[tuple[str, ...], Field(fail_fast=True)] = ()
    torchscript_omitted: str | None = None
    expected: ExpectedRecord | None = None
    targets: tuple[TargetsRecord, ...] = ()


_ADAPTER = TypeAdapter(Manifest)
_REQUIRED = [field.name for field in fields(Manifest) if field.default is MISSING]
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"\n}\n\Z')


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` into a version folder.

    Raises:
        ManifestError: It would be larger than `read_manifest` accepts.
    """
    content = asdict(manifest) | {"digest": ""}
    try:
        _require_modest(content)
    except ValueError as error:
        raise ManifestError(f"{folder / MANIFEST_FILE}: {error}; {_SMALLER}") from error
    unsigned = (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    digest = hashlib.sha256(unsigned).hexdigest()
    signed = unsigned.removesuffix(b'""\n}\n') + f'"{digest}"\n}}\n'.encode()
    if len(signed) > _LARGEST:
        raise ManifestError(
            f"{folder / MANIFEST_FILE}: has {len(signed):,} bytes, expected at most {_LARGEST:,}; "
            f"{_SMALLER}"
        )
    (folder / MANIFEST_FILE).write_bytes(signed)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a version folder.

    Raises:
        ManifestError: It is missing, not byte for byte what was written, of another format, or
            lacks something.
    """
    return parse_manifest(manifest_content(folder), folder)


def manifest_content(folder: Path) -> bytes:
    """Read the bytes of a version folder's manifest, or the first of too many.

    Raises:
        ManifestError: It cannot be read.
    """
    path = folder / MANIFEST_FILE
    try:
        with open_regular(path) as file:
            return file.read(_LARGEST + 1)
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read: {error.strerror}; every version folder has one: export again"
        ) from error


def parse_manifest(raw: bytes, folder: Path) -> Manifest:
    """Check the bytes of a manifest.

    Args:
        raw: The bytes.
        folder: Where they are from, for messages.

    Raises:
        ManifestError: They are not byte for byte what was written, of another format, or lack
            something.
    """
    path = folder / MANIFEST_FILE
    found = _DIGEST.search(raw)
    if found is None or len(raw) > _LARGEST:
        raise ManifestError(
            f"{path}: does not end with its digest, so it is truncated or was edited; export again"
        )
    unsigned = raw[: found.start(1)] + raw[found.end(1) :]
    digest = hashlib.sha256(unsigned).hexdigest()
    if digest != found.group(1).decode():
        raise ManifestError(
            f"{path}: SHA-256 is {digest}, the digest at its end says {found.group(1).decode()}: "
            "the file was changed after export; copy it or export again"
        )
    try:
        if raw.count(b"{") + raw.count(b"[") > _MOST_PARTS or raw.count(b":") > _MOST_PARTS:
            raise ValueError(f"expected at most {_MOST_PARTS:,} values")
        if raw.count(b",") > _LARGEST // 8:  # as written, a number has a line of its own
            raise ValueError(f"expected at most {_LARGEST // 8:,} numbers")
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        del content["digest"]
        if content.get("format") not in READABLE_FORMATS:
            raise ManifestError(
                f"{path}: bundle format {content.get('format')!r}, this version of kanserve reads "
                f"formats {' and '.join(map(str, READABLE_FORMATS))}; export again, or use the "
                "kanserve that wrote it"
            )
        _require_modest(content)
        content.clear()  # its memory is needed
        manifest = _ADAPTER.validate_json(raw[: found.start()].rstrip().removesuffix(b",") + b"}")
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: {_first_fault(error)}; export again") from error
    for needed in (MODEL_FILE, GOLDEN_FILE):
        if needed not in manifest.files:
            raise ManifestError(f"{path}: lists no {needed}; export again")
    return manifest


def _require_modest(content: dict[str, Any]) -> None:
    """Refuse what pydantic would copy many times: each fault it finds holds what it is found in.

    Raises:
        ValueError: A field is missing, or there is more than a manifest has.
    """
    for name in _REQUIRED:
        if name not in content:
            raise ValueError(f"{name}: Field required")
    rest = len(json.dumps({**content, "input_range": None}))
    if rest > _LARGEST_REST:
        raise ValueError(
            f"expected at most {_LARGEST_REST:,} bytes beside input_range, found {rest:,}"
        )


def _first_fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
    return str(error)
