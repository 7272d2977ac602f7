"""A file that answers rows with NaN by NaN, where a runtime would answer them with numbers.

In PyTorch NaN goes through every operator. In onnxruntime some lose it: MaxPool, LSTM and GRU on
CPU, for instance. The guard looks at the inputs alone, and so it is only for networks that
answer every row with NaN in it by NaN in all outputs.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

_SCOPE = "nan_guard"


def add_nan_guard(path: Path) -> None:
    """Make every output of a row NaN that has NaN in any floating-point input.

    Weights beside the file stay as they are.

    Args:
        path: The file, which is rewritten. Its inputs and outputs have the batch first.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    nodes: list[NodeProto] = []

    def add(operator: str, name: str, *inputs: str, **attributes: int) -> str:
        full = f"{_SCOPE}/{name}"
        nodes.append(
            helper.make_node(operator, inputs, [full], full, None, None, None, **attributes)
        )
        return full

    def constant(name: str, value: float | list[int]) -> str:
        array = np.array(value, np.int64 if isinstance(value, list) else np.float32)
        graph.initializer.append(numpy_helper.from_array(array, f"{_SCOPE}/{name}"))
        return f"{_SCOPE}/{name}"

    zero, axis, nan = constant("zero", 0.0), constant("axis", [1]), constant("nan", np.nan)
    found = ""
    for value in graph.input:
        if value.type.tensor_type.elem_type != TensorProto.FLOAT:
            continue
        own = value.name
        # (rows, ...) to (rows, 1): whether a row holds NaN
        flat = add("Flatten", f"{own}/flatten", own, axis=1)
        count = add("Cast", f"{own}/cast", add("IsNaN", f"{own}/isnan", flat), to=TensorProto.FLOAT)
        count = add("ReduceSum", f"{own}/reducesum", count, axis, keepdims=1)
        holds = add("Greater", f"{own}/greater", count, zero)
        found = add("Or", f"{own}/or", found, holds) if found else holds
    before = list(graph.node)
    for value in graph.output:
        bare = f"{_SCOPE}/{value.name}/unguarded"
        for node in before:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name == value.name:
                        names[place] = bare
        rank = len(value.type.tensor_type.shape.dim)
        shape = constant(f"{value.name}/shape", [-1] + [1] * (rank - 1))
        rows = add("Reshape", f"{value.name}/reshape", found, shape)
        nodes.append(
            helper.make_node("Where", [rows, nan, bare], [value.name], f"{_SCOPE}/{value.name}")
        )
    graph.node.extend(nodes)
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
