"""KANLinear layers as one node each, with a body of standard operators in the same file.

A model-local function is what a runtime computes for a node that it has no kernel for. onnxruntime
runs the body, unless it is given the library of kan_ops, whose operator then takes over.

Each layer has a body of its own, an overload of the operator named for the layer, because the form
that suits it depends on its knots and its width. This module knows no files.
"""

from collections.abc import Callable

import onnx_ir
import torch
from torch import Tensor, nn

import kan_ops
from export.lowering import LoweredKANLinear, fusible
from export.precision import Float32Product

IR_VERSION = 10
"""The oldest version of ONNX's format that knows overloads."""

INPUTS = ("x", "knots", "weight")
OUTPUTS = ("y",)


class Body(nn.Module):
    """A layer as a function of all its tensors.

    Args:
        layer: Not as an operator.
    """

    def __init__(self, layer: LoweredKANLinear) -> None:
        super().__init__()
        self.module = layer

    def forward(self, x: Tensor, knots: Tensor, weight: Tensor) -> Tensor:
        """Apply the layer; shape (rows, in) to (rows, out)."""
        tensors = {"basis.knots": knots, "product.weight": weight}
        y: Tensor = torch.func.functional_call(self.module, tensors, (x,))
        return y

    def example(self) -> tuple[Tensor, Tensor, Tensor]:
        """Make inputs to trace it with."""
        layer = self.module
        assert isinstance(layer.product, Float32Product)
        return torch.zeros(2, layer.in_features), layer.basis.knots, layer.product.weight


def name_overloads(model: onnx_ir.Model, network: nn.Module) -> None:
    """Tell the nodes of the operator apart, in a graph as the exporter made it.

    Args:
        model: Its initializers still have the names of the network's tensors.
        network: What it was made of.
    """
    by_knots = {f"{path}.basis.knots": name_of(path) for path in fusible(network)}
    for node in operators(model):
        knots = node.inputs[1]
        assert knots is not None
        assert knots.name is not None
        node.overload = by_knots[knots.name]


def name_of(path: str) -> str:
    """Name a layer as the network does, without the wrapper that holds the network."""
    return path.partition(".")[2]


def operators(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """List the nodes that are the fused operator."""
    kind = (kan_ops.DOMAIN, kan_ops.OPERATOR)
    return [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == kind]


def add_bodies(
    model: onnx_ir.Model, network: nn.Module, convert: Callable[[Body], onnx_ir.Model]
) -> None:
    """Give each overload of the operator its body.

    Args:
        model: From `network`.
        network: None of its layers is written as the operator any more.
        convert: Writes a body as a graph of its own, with the same opset.
    """
    layers = {name_of(path): layer for path, layer in fusible(network).items()}
    for node in operators(model):
        model.opset_imports[kan_ops.DOMAIN] = 1
        model.ir_version = max(model.ir_version, IR_VERSION)
        graph = convert(Body(layers[node.overload]).eval()).graph
        beginning = graph[0]
        for name, value in list(graph.initializers.items()):  # a function has none
            constant = onnx_ir.node("Constant", [], {"value": value.const_value}, name=name)
            value.replace_all_uses_with(constant.outputs[0])
            del graph.initializers[name]
            constant.outputs[0].name = name
            graph.insert_before(beginning, constant)
        function = onnx_ir.Function(
            kan_ops.DOMAIN,
            kan_ops.OPERATOR,
            node.overload,
            graph=graph,
            attributes=[onnx_ir.Attr(a.name, a.type, None) for a in node.attributes.values()],
        )
        model.functions[function.identifier()] = function
