"""A network that computes gradients in its forward (forces, flows), to one that the exporters take.

They trace no call of autograd. So the network is traced beforehand, with autograd run, into a graph
of the operations that the gradients are made of. Such a graph has no modules: its layers are
written as standard operators.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from export.network import Call


def trace_gradients(network: Call, example: tuple[Tensor, ...]) -> torch.fx.GraphModule:
    """Trace a network with the gradients that it computes.

    Args:
        network: In evaluation mode.
        example: Inputs of at least two rows.

    Returns:
        The same function, for any number of rows.

    Raises:
        Exception: Whatever torch raises for what it cannot trace.
    """
    graph: torch.fx.GraphModule = make_fx(
        network,
        decomposition_table={
            **core_aten_decompositions(),
            torch.ops.aten.empty_permuted.default: _zeros,
        },
        tracing_mode="symbolic",
        _allow_non_fake_inputs=True,  # the weights
    )(*example)
    return graph.eval()


def _zeros(sizes: Sequence[int], order: Sequence[int], **options: Any) -> Tensor:
    """Make what is overwritten later; the converter knows no other order in memory."""
    return torch.zeros(list(sizes), dtype=options.get("dtype"), device=options.get("device"))


def script_graph(graph: torch.fx.GraphModule) -> torch.jit.ScriptModule:
    """Script a traced graph: traced once more, it would be fixed to one number of rows.

    Args:
        graph: As `trace_gradients` returns it. It is changed.
    """
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif isinstance(node.target, torch._ops.OpOverload):  # which TorchScript chooses itself
            node.target = node.target.overloadpacket
    graph.recompile()
    return torch.jit.script(graph)
