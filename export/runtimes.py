"""What runs a network or its files here: eager PyTorch, onnxruntime and TorchScript.

A runtime takes arrays and gives arrays. This module knows no probes, and judges nothing.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

import kan_ops
from export.conversion.torchscript import deprecation_accepted
from export.errors import ConversionError, cause
from export.network import Call

Arrays = Sequence[NDArray[Any]]

Runner = Callable[[Arrays], Arrays]
"""Takes one array for each input of a network, (batch, ...); returns one for each output."""


@dataclass(frozen=True)
class Session:
    """A file in onnxruntime.

    Attributes:
        run: As for every `Runner`.
        input_names: Names of its inputs, in the order in which `run` takes them.
        output_names: Names of its outputs, in the order in which `run` returns them.
    """

    run: Runner
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run it."""
        return self.run(inputs)


def load_eager(call: Call) -> Runner:
    """Run a network as its author wrote it, in PyTorch."""

    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            return [y.numpy() for y in call(*map(torch.from_numpy, inputs))]

    return run


def load_onnx(path: Path, *, fused: bool = False) -> Session:
    """Load a file as it will be served: onnxruntime, CPU, all graph optimisations.

    Args:
        path: The file.
        fused: Whether to run KANLinear nodes by the library of kan_ops, which must be there,
            instead of their bodies.

    Raises:
        ConversionError: onnxruntime is not installed, or cannot load the file.
    """
    # onnxruntime would send usage data home and keep a database in the user's folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise ConversionError(
            "onnxruntime is needed to verify the export; "
            "install kanserve's extra cpu or gpu: pip install '.[cpu]' in its checkout"
        ) from error
    options = onnxruntime.SessionOptions()
    try:
        if fused:
            kan_ops.register(options)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime, which has a class for each kind
        raise ConversionError(
            f"onnxruntime {onnxruntime.__version__} cannot run the file: {cause(error)}; it may "
            "not know the newest operators yet: choose a lower --opset"
        ) from error
    names = [tensor.name for tensor in session.get_inputs()]

    def run(inputs: Arrays) -> Arrays:
        outputs: Arrays = session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs

    return Session(run, tuple(names), tuple(tensor.name for tensor in session.get_outputs()))


def load_torchscript(path: Path) -> Runner:
    """Load a TorchScript file that this process has just written. It is code: never load others.

    Raises:
        ConversionError: It cannot be loaded.
    """
    try:
        with deprecation_accepted():
            program = torch.jit.load(path, map_location="cpu")
    except Exception as error:  # torch has no class for it
        raise ConversionError(f"TorchScript cannot load its own file: {cause(error)}") from error

    @torch.no_grad()
    def run(inputs: Arrays) -> Arrays:
        found = program(*(torch.from_numpy(array) for array in inputs))
        return [y.numpy() for y in (found if isinstance(found, tuple) else (found,))]

    return run
