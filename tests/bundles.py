"""Bundles: running their file as it is, how close it must be, and more versions of one."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from kan_bundle.manifest import read_manifest, write_manifest

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
