"""The files that contenders load, made from a KAN. torch is imported where it is used."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from kan_model import KAN


def _write_pickle(kan: "KAN", path: Path) -> None:
    import torch

    torch.save(kan, path)


def _write_trace(kan: "KAN", path: Path) -> None:
    import torch

    torch.jit.save(torch.jit.trace(kan, _example(kan), check_trace=False), path)


def _write_naive_onnx(kan: "KAN", path: Path) -> None:
    """Export as everybody would: the module as it is, dynamic batch, all else by default."""
    import torch

    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(
        kan,
        (_example(kan),),
        path,
        dynamo=True,
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=(batch,),
        external_data=False,
        verbose=False,
    )


def _write_package(kan: "KAN", path: Path) -> None:
    import torch

    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        program = torch.export.export(kan, (_example(kan),), dynamic_shapes=(batch,))
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"freezing": True}
        )


def _write_bundle(kan: "KAN", path: Path, *, inline: bool = False) -> None:
    """Let the project's own export write all that it writes; `path` is below OUTPUT/NAME/1."""
    from export import export_module

    name = path.parent.parent
    export_module(kan, name=name.name, output=name.parent, version=1, inline=inline)


def _write_products(kan: "KAN", path: Path) -> None:
    """Write only the layers' matrix products, each on an input of its own."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, inputs, outputs, weights = [], [], [], []
    for i, layer in enumerate(kan.layers):
        columns = layer.in_features * (layer.grid_size + layer.spline_order + 1)
        shape = {f"x{i}": columns, f"y{i}": layer.out_features}
        x, y = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
            for name, size in shape.items()
        )
        matrix = np.random.default_rng(i).standard_normal((columns, layer.out_features))
        weights.append(numpy_helper.from_array(matrix.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"]))
        inputs.append(x)
        outputs.append(y)
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


def _write_identity(kan: "KAN", path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", kan.layers[0].in_features])
        for name in ("x", "y")
    )
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


OUR_ONNX = "ours/1/model.onnx"
OUR_INLINE = "inline/1/model.onnx"
OUR_SCRIPT = "ours/1/model.ts"

WRITERS: dict[str, Callable[["KAN", Path], None]] = {
    "kan.pt": _write_pickle,
    "trace.ts": _write_trace,
    "naive.onnx": _write_naive_onnx,
    "package.pt2": _write_package,
    OUR_ONNX: _write_bundle,
    OUR_INLINE: partial(_write_bundle, inline=True),
    OUR_SCRIPT: _write_bundle,
    "products.onnx": _write_products,
    "identity.onnx": _write_identity,
}
"""By path below the model's folder: what writes the file."""


def _example(kan: "KAN") -> "Tensor":
    import torch

    return torch.zeros(2, kan.layers[0].in_features)
