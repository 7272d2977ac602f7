"""KANLinear layers as one node each, with a body of standard operators in the same file.

A model-local function is what a runtime computes for a node that it has no kernel for. onnxruntime
runs the body, unless it is given the library of kan_ops, whose operator then takes over.

Each layer has a body of its own, an overload of the operator named for the layer, because the form
that suits it depends on its knots and its width. The bodies are traced and converted together with
the network, as further outputs of further inputs, and parted from it at the end. This module knows
no files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

import kan_ops
from export.conversion.lowering import LoweredKANLinear, as_operators
from export.conversion.precision import Float32Product
from export.conversion.symbolic import LAYER
from export.network import Call

IR_VERSION = 10
"""The oldest version of ONNX's format that knows overloads."""

_INPUTS = ("x", "knots", "weight")
_OUTPUT = "y"


class WithBodies(nn.Module):
    """A network that calls layers as operators, and beside it what each of them computes.

    Args:
        network: Its layers are in the form that is exported.
        layers: Those of them to call as operators.
    """

    def __init__(self, network: Call, layers: Sequence[LoweredKANLinear]) -> None:
        super().__init__()
        self.training = False  # of this alone: a network's own `train` may do anything
        self.module = network.module  # at the path where `network` has it
        self._network = network.forward
        self._layers = tuple(layers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the network on the first inputs, and the layers on `_INPUTS` of each of them."""
        count = len(inputs) - len(_INPUTS) * len(self._layers)
        with as_operators(self._layers):
            outputs = self._network(*inputs[:count])
        bodies = []
        for i, layer in enumerate(self._layers):
            x, knots, weight = inputs[count + len(_INPUTS) * i :][: len(_INPUTS)]
            tensors = {"basis.knots": knots, "product.weight": weight}
            bodies.append(torch.func.functional_call(layer, tensors, (x,)))
        return (*outputs, *bodies)

    def examples(self) -> tuple[Tensor, ...]:
        """Make further inputs to trace it with; of each three the first has rows."""
        found = []
        for layer in self._layers:
            assert isinstance(layer.product, Float32Product)
            x = torch.zeros(2, layer.in_features)
            found += [x, layer.basis.knots, layer.product.weight]
        return tuple(tensor.detach() for tensor in found)  # the exporter knows its own by identity

    def dynamic_shapes(self) -> list[Mapping[int, Any] | None]:
        """Describe which sizes of the further inputs vary: the rows, for each layer by themselves.

        If layers shared one size, the exporter would read it from one of the bodies for all.
        """
        rows = [{0: torch.export.Dim(f"rows_{i}")} for i in range(len(self._layers))]
        return [own if tensor == "x" else None for own in rows for tensor in _INPUTS]

    def names(self) -> tuple[list[str], list[str]]:
        """Name the further inputs and outputs."""
        inputs = [f"{layer.name}/{tensor}" for layer in self._layers for tensor in _INPUTS]
        return inputs, [f"{layer.name}/{_OUTPUT}" for layer in self._layers]

    def name_overloads(self, model: onnx_ir.Model) -> None:
        """Tell the nodes of the operator apart, in a graph as the exporter made it of this."""
        for node in _operators(model):
            node.overload = node.metadata_props[LAYER]

    def part(self, model: onnx_ir.Model) -> frozenset[str]:
        """Make functions of the bodies, and leave the network alone in the graph.

        Returns:
            The names of the layers that the network calls, and so of the functions.
        """
        nodes = {node.overload: node for node in _operators(model)}
        count = len(model.graph.inputs) - len(_INPUTS) * len(self._layers)
        results = len(model.graph.outputs) - len(self._layers)
        for i, name in enumerate(layer.name for layer in self._layers):
            if name not in nodes:
                continue  # the network has the layer, and does not call it
            graph = model.graph.clone()
            inputs = graph.inputs[count + len(_INPUTS) * i :][: len(_INPUTS)]
            output = graph.outputs[results + i]
            _reduce(graph, inputs, [output])
            for value, own_name in zip((*inputs, output), (*_INPUTS, _OUTPUT), strict=True):
                value.name = own_name
            _inline_initializers(graph)
            attributes = nodes[name].attributes.values()
            function = onnx_ir.Function(
                kan_ops.DOMAIN,
                kan_ops.OPERATOR,
                name,
                graph=graph,
                attributes=[onnx_ir.Attr(a.name, a.type, None) for a in attributes],
            )
            model.functions[function.identifier()] = function
        _reduce(model.graph, model.graph.inputs[:count], model.graph.outputs[:results])
        if nodes:
            model.opset_imports[kan_ops.DOMAIN] = 1
            model.ir_version = max(model.ir_version, IR_VERSION)
        return frozenset(nodes)


def _reduce(
    graph: onnx_ir.Graph, inputs: Sequence[onnx_ir.Value], outputs: Sequence[onnx_ir.Value]
) -> None:
    """Leave only what leads to some outputs, which is to need no other inputs than these."""
    graph.outputs[:] = outputs
    model, remove = onnx_ir.Model(graph, ir_version=IR_VERSION), common.RemoveUnusedNodesPass()
    in_branches = [node for node in graph.all_nodes() if node.graph is not graph]
    while remove(model).modified:
        left = set(graph.all_nodes())
        for node in in_branches:
            if node not in left:  # it went with its `If`, and still holds on to what it reads
                for place in range(len(node.inputs)):
                    node.replace_input_with(place, None)
    graph.inputs[:] = inputs


def _inline_initializers(graph: onnx_ir.Graph) -> None:
    """Turn initializers, which a function has none of, into nodes.

    Sizes are forgotten too: what is `batch` here is another number where the function is called.
    """
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        value.shape = None
    beginning = graph[0]
    for name, value in list(graph.initializers.items()):
        constant = onnx_ir.node("Constant", [], {"value": value.const_value}, name=name)
        value.replace_all_uses_with(constant.outputs[0])
        del graph.initializers[name]
        constant.outputs[0].name = name
        graph.insert_before(beginning, constant)


def _operators(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    kind = (kan_ops.DOMAIN, kan_ops.OPERATOR)
    return [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == kind]
