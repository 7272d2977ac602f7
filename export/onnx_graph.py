"""A network to ONNX, and such a file to something that runs.

The batch is the only dynamic dimension; it is named `batch`. The weights are inside the file, or,
where they do not fit, in the one file beside it.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.errors import ConversionError, conversion
from export.parity import Runner
from kan_bundle.layout import WEIGHTS_FILE
from kan_bundle.manifest import TensorSpec

OPSET = 20
LARGEST_INLINE = 2**30
"""Bytes of weights inside the file. protobuf ends at twice that, and reads it all into memory."""


def write_onnx(
    network: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    path: Path,
    graph_name: str,
    metadata: Mapping[str, str],
) -> None:
    """Write a network as ONNX.

    Args:
        network: In evaluation mode, float32; takes one tensor for each input, gives a tuple.
        example: Inputs of at least two rows.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        path: Where to write.
        graph_name: Name of the graph.
        metadata: Written to the model's `metadata_props`.

    Raises:
        ConversionError: The network cannot be converted, or the graph is not what was asked for.
    """
    batch = {0: torch.export.Dim("batch")}
    with _quiet_exporter(), conversion("ONNX"):
        program = torch.onnx.export(
            network,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=(tuple(batch for _ in inputs),),
            verbose=False,
        )
    if program is None:  # the signature allows it for files written directly
        raise ConversionError("torch.onnx.export returned no program")
    model = program.model
    _forget_the_exporting_machine(model)
    _name_after_the_network(model)
    model.producer_name = "kanserve"
    model.producer_version = metadata.get("kanserve.version", "")
    model.graph.name = graph_name
    model.metadata_props.update(metadata)
    opset = dict(model.opset_imports)
    if opset != {"": OPSET}:
        raise ConversionError(f"{path.name}: asked for opset {OPSET} alone, the file has {opset}")
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    with conversion("ONNX"):
        onnx_ir.save(model, path, external_data=WEIGHTS_FILE if weights > LARGEST_INLINE else None)
        onnx.checker.check_model(str(path), full_check=True)
    for value in model.graph.initializers.values():
        value.const_value = None  # onnxscript's rewriter holds on to the graph it saw last


def load_onnx(path: Path) -> Runner:
    """Load a file as it will be served: onnxruntime, CPU, all graph optimisations.

    Raises:
        ConversionError: onnxruntime is not installed, or cannot load the file.
    """
    # onnxruntime would send usage data home and keep a database in the user's folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise ConversionError(
            "onnxruntime is needed to verify the export; install kanserve[cpu] or kanserve[gpu]"
        ) from error
    with conversion("ONNX"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]

    def run(inputs: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
        outputs: Sequence[NDArray[np.float32]] = session.run(
            None, dict(zip(names, inputs, strict=True))
        )
        return outputs

    return run


def _forget_the_exporting_machine(model: onnx_ir.Model) -> None:
    """Drop the exporter's notes, which hold stack traces with the paths of this machine."""
    graph = model.graph
    nodes = list(graph.all_nodes())
    values = [value for node in nodes for value in node.outputs]
    values += [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    parts: list[onnx_ir.Model | onnx_ir.Graph | onnx_ir.Node | onnx_ir.Value] = [model, graph]
    for part in (*parts, *nodes, *values):
        part.metadata_props.clear()
        part.doc_string = None


def _name_after_the_network(model: onnx_ir.Model) -> None:
    """Take the wrapper's own name off the weights' names."""
    taken = {value.name for node in model.graph for value in node.outputs}
    taken |= {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    for name in list(model.graph.initializers):
        short = name.removeprefix("module.")
        if short not in taken:
            model.graph.initializers[name].name = short


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch 2.13's exporter says that its user can do nothing about."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # that torchvision is not installed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*axis name: batch will not be used.*")
            warnings.filterwarnings("ignore", message=".*was assigned during export.*")
            yield
    finally:
        registration.setLevel(level)
