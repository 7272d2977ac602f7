"""A network to one self-contained ONNX file, and such a file to something that runs.

The batch is the only dynamic dimension; it is named `batch`.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from export.errors import ConversionError, conversion

OPSET = 20
INPUT_NAME = "input"
OUTPUT_NAME = "output"


def write_onnx(
    network: nn.Module, in_features: int, path: Path, graph_name: str, metadata: Mapping[str, str]
) -> None:
    """Write a network as ONNX, with its weights inside the file.

    Args:
        network: In evaluation mode, float32; takes (batch, in), gives (batch, out).
        in_features: Width of the input.
        path: Where to write.
        graph_name: Name of the graph.
        metadata: Written to the model's `metadata_props`.

    Raises:
        ConversionError: The network cannot be converted, or the graph is not what was asked for.
    """
    with _quiet_exporter(), conversion("ONNX"):
        program = torch.onnx.export(
            network,
            (torch.zeros(2, in_features),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    if program is None:  # the signature allows it for files written directly
        raise ConversionError("torch.onnx.export returned no program")
    model = program.model_proto
    _forget_the_exporting_machine(model)
    model.producer_name = "kanserve"
    model.producer_version = metadata.get("kanserve.version", "")
    model.graph.name = graph_name
    onnx.helper.set_model_props(model, dict(metadata))
    with conversion("ONNX"):
        onnx.checker.check_model(model, full_check=True)
    opset = {entry.domain: entry.version for entry in model.opset_import}
    if opset != {"": OPSET}:
        raise ConversionError(f"{path.name}: asked for opset {OPSET} alone, the file has {opset}")
    path.write_bytes(model.SerializeToString())


def load_onnx(path: Path) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Load a file as it will be served: onnxruntime, CPU, all graph optimisations.

    Raises:
        ConversionError: onnxruntime is not installed, or cannot load the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConversionError(
            "onnxruntime is needed to verify the export; install kanserve[cpu] or kanserve[gpu]"
        ) from error
    with conversion("ONNX"):
        session = onnxruntime.InferenceSession(
            path.read_bytes(), providers=["CPUExecutionProvider"]
        )

    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = session.run([OUTPUT_NAME], {INPUT_NAME: x})[0]
        return output

    return run


def _forget_the_exporting_machine(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes, which hold stack traces with the paths of this machine."""
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("metadata_props")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch 2.13's exporter says that its user can do nothing about."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # that torchvision is not installed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)
