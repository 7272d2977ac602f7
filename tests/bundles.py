"""Bundles: running their file as it is, loading them as a server, and more versions of one."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from kan_bundle.manifest import Manifest, read_manifest, write_manifest
from serving.batching import Limits
from serving.engine import Engine, EngineOptions

# Two float32 runtimes, which add in different orders, at outputs of about 1.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
LIMITS = Limits(1024, 0.0, 2**20, 2**30)


def run_onnx(folder: Path, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [tensor.name for tensor in session.get_inputs()]
    found: list[NDArray[Any]] = session.run(None, dict(zip(names, inputs, strict=True)))
    return found


def make_engine(model: bytes, manifest: Manifest, folder: Path) -> Engine:
    return Engine(model, manifest, folder, EngineOptions(fused=True))


def publish(source: Path, model: Path, version: int) -> Path:
    """Publish a bundle as a version of a model, all at once, as an export does."""
    staging = model.parent / f".staging-{model.name}-{version}"
    shutil.copytree(source, staging)
    changed = replace(read_manifest(staging), name=model.name, version=version)
    write_manifest(changed, staging)
    model.mkdir(exist_ok=True)
    return staging.rename(model / str(version))
