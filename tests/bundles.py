"""Running the file of a bundle as it is, and how close it must be."""

from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

# Two float32 runtimes, which add in different orders, at outputs of about 1.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}


def run_onnx(folder: Path, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [tensor.name for tensor in session.get_inputs()]
    found: list[NDArray[Any]] = session.run(None, dict(zip(names, inputs, strict=True)))
    return found
