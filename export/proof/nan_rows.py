"""NaN in the inputs: which operators of a file lose it, and what is to be done about it.

PyTorch carries NaN through every operator. Some kernels of onnxruntime do not, and then a row with
NaN in it is answered with plausible numbers. Here such operators are found by running the file and
looking at what goes into them and what comes out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export.probes import Probes
from export.proof.reference import Reference
from export.runtimes import load_onnx

_KEEP_NAN_IN_TORCH = frozenset(
    (
        *("AveragePool", "Celu", "Clip", "Elu", "Erf", "GRU", "Gelu", "GlobalMaxPool"),
        *("HardSigmoid", "HardSwish", "LSTM", "LeakyRelu", "LogSoftmax", "LpPool", "Max"),
        *("MaxPool", "Min", "Mish", "PRelu", "RNN", "ReduceMax", "ReduceMin", "Relu", "Selu"),
        *("Sigmoid", "Sign", "Softmax", "Softplus", "Softsign", "Tanh", "ThresholdedRelu", "TopK"),
    )
)
_RECURRENT = ("LSTM", "GRU", "RNN")
_ROWS = 8  # that are looked at
_PROBE_FILE = "nan-probe.onnx"


def rows_with_nan(probes: Probes) -> NDArray[np.bool_]:
    """Find the rows with NaN in any input, shape (rows,)."""
    found = np.zeros(len(probes), dtype=bool)
    for array in probes.inputs:
        if array.dtype.kind == "f":
            found |= np.isnan(array).reshape(len(array), -1).any(axis=1)
    return found


def lost_rows(found: NDArray[np.float64], reference: Reference) -> NDArray[np.bool_]:
    """Find the rows with NaN that a runtime answers with a number where the network does not.

    Args:
        found: Outputs from `run_probes`, shape (batch sizes, rows, numbers).
        reference: From `make_reference`.

    Returns:
        Shape (rows,).
    """
    lost = (np.isnan(reference.outputs) & ~np.isnan(found)).any(axis=(0, 2))
    rows: NDArray[np.bool_] = lost & rows_with_nan(reference.probes)
    return rows


def answers_nan_by_nan(reference: Reference) -> bool:
    """Tell whether the network answers every row with NaN by NaN in all outputs."""
    rows = rows_with_nan(reference.probes)
    return bool(rows.any() and np.isnan(reference.outputs[rows]).all())


def find_lossy_operators(
    model: Path, inputs: Sequence[NDArray[Any]], layers: Sequence[str]
) -> tuple[str, ...]:
    """Find operators outside the KANLinear layers that answer NaN with numbers.

    Only operators that keep NaN by their definition in PyTorch count: a comparison does not.

    Args:
        model: The file. Another one is written beside it, and removed.
        inputs: Rows with NaN for each input.
        layers: Names of the KANLinear layers, whose operators do not count.

    Returns:
        Each as `MaxPool (features.2)`.
    """
    content = onnx.load(model, load_external_data=False)
    graph = content.graph
    nodes = [
        node
        for node in graph.node
        if node.op_type in _KEEP_NAN_IN_TORCH
        and not node.domain
        and not any(node.name == name or node.name.startswith(f"{name}/") for name in layers)
    ]
    known = {value.name for value in (*graph.input, *graph.output)}
    known |= {tensor.name for tensor in graph.initializer}
    for name in dict.fromkeys(name for node in nodes for name in (node.input[0], _result(node))):
        if name not in known:
            graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    probe = model.with_name(_PROBE_FILE)
    try:
        onnx.save(content, probe)
        session = load_onnx(probe)
    finally:
        probe.unlink(missing_ok=True)
    lossy: dict[str, None] = {}
    for row in np.linspace(0, len(inputs[0]) - 1, min(_ROWS, len(inputs[0]))).astype(int):
        given = [array[row : row + 1] for array in inputs]
        values = dict(zip(session.input_names, given, strict=True))
        values |= dict(zip(session.output_names, session(given), strict=True))
        for node in nodes:
            x, y = values.get(node.input[0]), values.get(_result(node))
            if x is not None and y is not None and _is_lost(node.op_type, x, y):
                lossy[f"{node.op_type} ({node.name})"] = None
    return tuple(lossy)


def _result(node: onnx.NodeProto) -> str:
    """Name the first result that is there; a recurrent layer may return its last state alone."""
    return str(next(name for name in node.output if name))


def _is_lost(operator: str, x: NDArray[Any], y: NDArray[Any]) -> bool:
    if x.dtype.kind != "f" or y.dtype.kind != "f":
        return False
    given, kept = np.isnan(x), np.isnan(y)
    if operator in _RECURRENT and y.ndim == 4 and given.any():
        first = int(np.argmax(given.any(axis=(1, 2))))  # every later state depends on that step
        return int(kept.any(axis=(1, 2, 3)).sum()) < len(x) - first
    if x.shape == y.shape:
        return bool((given & ~kept).any())
    return bool(given.any() and not kept.any())
