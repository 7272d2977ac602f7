"""Bundles: running their file, how close it must be, more versions of one, and one by hand."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kan_bundle.golden import Golden, write_golden
from kan_bundle.manifest import FileRecord, Manifest, TensorSpec, read_manifest, write_manifest

# Two float32 runtimes, which add in different orders, at outputs of about 1.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}


FOREIGN = helper.make_node("Gelu", ["input"], ["w"], domain="com.microsoft")
"""A node that no bundle may have."""


def run_onnx(folder: Path, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [tensor.name for tensor in session.get_inputs()]
    found: list[NDArray[Any]] = session.run(None, dict(zip(names, inputs, strict=True)))
    return found


def publish(source: Path, model: Path, version: int) -> Path:
    """Publish a bundle as a version of a model, all at once, as an export does."""
    staging = model.parent / f".staging-{model.name}-{version}"
    shutil.copytree(source, staging)
    changed = replace(read_manifest(staging), name=model.name, version=version)
    write_manifest(changed, staging)
    model.mkdir(exist_ok=True)
    return staging.rename(model / str(version))


TABLE = np.random.default_rng(50).normal(size=(50, 3)).astype(np.float32)
"""The embedding of `write_lookup`: a row for each token from 0 to 49."""

LOOKUP_INPUTS = (
    TensorSpec("tokens", "INT64", (-1, 4), allowed=(0, 49)),
    TensorSpec("x", "FP32", (-1, 2), rejects_nan=True),
)


def look_up(tokens: NDArray[Any], x: NDArray[Any]) -> NDArray[np.float32]:
    """What the network of `write_lookup` answers."""
    found: NDArray[np.float32] = TABLE[tokens].sum(axis=1) + np.fmax(x, 0).sum(axis=1)[:, None]
    return found


def write_lookup(
    source: Path, root: Path, *, inputs: tuple[TensorSpec, ...] = LOOKUP_INPUTS, version: int = 1
) -> Path:
    """Write a network with an embedding, by hand, as a version of the model `lookup`.

    Like networks that are exported, its file answers what the network would not: token -1 as 49,
    and NaN in `x` as 0.

    Args:
        source: A version folder of any bundle, for what the manifest says beside.
        root: The repository.
        inputs: As the manifest describes them.
        version: Its number.
    """
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["rows"], axis=0),
        helper.make_node("ReduceSum", ["rows", "axis"], ["embedded"], keepdims=0),
        helper.make_node("Greater", ["x", "zero"], ["is_positive"]),
        helper.make_node("Where", ["is_positive", "x", "zero"], ["positive"]),
        helper.make_node("ReduceSum", ["positive", "axis"], ["added"], keepdims=1),
        helper.make_node("Add", ["embedded", "added"], ["output"]),
    ]
    constants = {"table": TABLE, "axis": np.array([1]), "zero": np.zeros(1, np.float32)}
    graph = helper.make_graph(
        nodes,
        "lookup",
        [
            helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", 4]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2]),
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    folder = root / "lookup" / str(version)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    tokens, x = np.array([[0, 1, 2, 49]]), np.array([[-1.0, 2.0]], np.float32)
    y = look_up(tokens, x).astype(np.float64)
    write_golden(Golden((tokens, x), y, np.full_like(y, 1e-5)), folder / "golden.npz")
    changed = replace(
        read_manifest(source),
        name="lookup",
        version=version,
        layers=(),
        input_range=None,
        inputs=inputs,
        outputs=(TensorSpec("output", "FP32", (-1, 3)),),
        files={name: _record(folder / name) for name in ("model.onnx", "golden.npz")},
    )
    write_manifest(changed, folder)
    return folder


def set_inputs(folder: Path, **rules: Mapping[str, Any]) -> Manifest:
    """Rewrite the manifest of a bundle with other rules for its inputs, by name."""
    manifest = read_manifest(folder)
    inputs = tuple(replace(spec, **rules.get(spec.name, {})) for spec in manifest.inputs)
    changed = replace(manifest, inputs=inputs)
    write_manifest(changed, folder)
    return changed


def _record(path: Path) -> FileRecord:
    content = path.read_bytes()
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())
