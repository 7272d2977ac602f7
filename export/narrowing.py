"""A KAN without the nodes that are idle: whole nodes removed are what makes a pruned one faster.

A node is idle if it has no way to an output, or if what reaches it is the same for every input. It
is left out with its edges, and the constants that such nodes contributed are added up in float64. A
single edge of zeros saves nothing: every layer remains one product of a full matrix.

A KANLinear has no bias, so what edges that were left out add on average is added behind the layer:
by an `OffsetLayer` around it, or, in a KAN without its idle nodes, together with their constants.

Inputs and outputs of the network keep their shapes, and NaN or infinity in an input without edges
still makes every answer NaN, as zeros times NaN do. Splines of order 0 have no NaN at infinity, and
a network of those is left as it is.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kan_model import KAN, KANLinear
from kan_model.activations import NAMED

_FEW = 0.5
"""Share of the inputs, up to which idle ones stay.

To take the others out of a row costs as much as half of the inputs: fused, at batch 256 on one
core, [784, 64, 10] takes 1.43, 0.96 and 0.52 of its time without a quarter, a half and three
quarters of them (onnxruntime 1.32.0, whose Gather copies number by number).
"""

_BUDGET = 2**22  # weights that are looked at together


@dataclass(frozen=True)
class Nodes:
    """Which nodes of a KAN take part, and what those add that are always the same.

    Attributes:
        varying: Whether a node depends on any input: for the inputs and for the outputs of every
            layer, shape (width,) each.
        kept: Whether it takes part, likewise.
        offsets: What constant nodes, and the means of edges that were left out, add to the outputs
            of each layer, float64, shape (width,) each.
    """

    varying: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]

    @property
    def removed(self) -> tuple[int, ...]:
        """Count those that are left out, by inputs, hidden layers and outputs."""
        return tuple(int((~kept).sum()) for kept in self.kept)


@torch.no_grad()
def find_nodes(
    kan: KAN, edges: Sequence[Tensor] | None = None, means: Sequence[Tensor] | None = None
) -> Nodes:
    """Find out which nodes take part. Outputs always do, and inputs unless most are idle.

    Args:
        kan: It is not changed, nor copied: what is constant is worked out from its own edges alone.
        edges: Of each layer, from `edges_of`; None finds them here.
        means: What is to be added to the outputs of each layer, float64, shape (width,) each; None
            adds nothing.
    """
    if edges is None:
        edges = [edges_of(layer) for layer in kan.layers]
    if means is None:
        means = [torch.zeros(len(there), dtype=torch.float64) for there in edges]
    constant = torch.zeros(kan.layers[0].in_features, dtype=torch.bool)
    value = torch.zeros(len(constant), dtype=torch.float64)
    varying, offsets = [~constant], []
    for layer, there, mean in zip(kan.layers, edges, means, strict=True):
        offset = mean
        if bool(constant.any()):
            every = torch.ones_like(offset, dtype=torch.bool)
            exact = copy.deepcopy(_some_of(layer, constant, every)).double()
            offset = mean + exact(value[constant].unsqueeze(0))[0]
        constant = ~(there & ~constant).any(dim=1)
        value = torch.where(constant, offset, 0.0)
        offsets.append(offset)
        varying.append(~constant)
    wanted = torch.ones_like(varying[-1])
    kept = [wanted]
    for there, reached in zip(reversed(edges), reversed(varying[:-1]), strict=True):
        wanted = there[wanted].any(dim=0) & reached
        kept.insert(0, wanted)
    if int((~kept[0]).sum()) <= _FEW * len(kept[0]):
        kept[0] = torch.ones_like(kept[0])
    return Nodes(tuple(varying), tuple(kept), tuple(offsets))


@torch.no_grad()
def edges_of(layer: KANLinear) -> Tensor:
    """Tell which edges of a layer have a weight that is not zero, shape (out, in)."""
    found = layer.base_weight != 0
    rows = max(1, _BUDGET // layer.spline_weight[0].numel())
    for start in range(0, len(found), rows):  # scaled, they would be as large again
        some = slice(start, start + rows)
        weight = layer.spline_weight[some]
        if layer.enable_standalone_scale_spline:
            weight = weight * layer.spline_scaler[some, :, None]
        found[some] |= (weight != 0).any(dim=-1)
    return found


def can_be_narrowed(kan: KAN) -> bool:
    """Tell whether a KAN without its idle nodes would compute the same.

    A user's own activation may know channels. Splines of order 0 answer infinity with a number
    where the activation does, which what is left out cannot be.
    """
    known = {type(make()) for make in NAMED.values()}
    return all(
        type(layer.base_activation) in known and layer.spline_order > 0 for layer in kan.layers
    )


class OffsetLayer(nn.Module):
    """A layer and a constant that is added to each of its outputs.

    Args:
        layer: In evaluation mode.
        offset: Shape (out,).
    """

    layer: nn.Module
    offset: Tensor

    def __init__(self, layer: nn.Module, offset: Tensor) -> None:
        super().__init__()
        self.training = False  # of this alone: a layer's own `train` may do anything
        self.layer = layer
        self.register_buffer("offset", offset)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Apply the layer and add the constant; shape (..., in) to (..., out)."""
        y: Tensor = self.layer(*inputs, **named)
        return y + self.offset

    def __getattr__(self, name: str) -> Any:
        """Give what a network may want to know of its layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":  # before it is set
                raise
            return getattr(self.layer, name)


class NarrowKAN(nn.Module):
    """A KAN without its idle nodes.

    Args:
        kan: In float32, in evaluation mode.
        nodes: From `find_nodes`.
    """

    inputs: Tensor | None
    nothing: Tensor | None

    def __init__(self, kan: KAN, nodes: Nodes) -> None:
        super().__init__()
        pairs = zip(kan.layers, nodes.kept[:-1], nodes.kept[1:], strict=True)
        self.layers = nn.ModuleList(_some_of(layer, given, gives) for layer, given, gives in pairs)
        for i, (offset, kept) in enumerate(zip(nodes.offsets, nodes.kept[1:], strict=True)):
            own = offset[kept].float()
            self.register_buffer(f"offset_{i}", own if bool(own.any()) else None)
        dropped = not bool(nodes.kept[0].all())
        width = len(nodes.kept[0])
        self.register_buffer("inputs", nodes.kept[0].nonzero().flatten() if dropped else None)
        self.register_buffer("nothing", torch.zeros(width, 1) if dropped else None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers in turn; shape (rows, in) to (rows, out)."""
        y = x if self.inputs is None else x.index_select(1, self.inputs)
        for i, layer in enumerate(self.layers):
            y = layer(y)
            offset: Tensor | None = getattr(self, f"offset_{i}")
            if offset is not None:
                y = y + offset
        return y if self.nothing is None else y + x @ self.nothing


def _some_of(layer: KANLinear, inputs: Tensor, outputs: Tensor) -> KANLinear:
    """Take a layer with some of its inputs and outputs, given as masks."""
    if bool(inputs.all()) and bool(outputs.all()):
        return layer
    some = copy.copy(layer)
    some._parameters = {
        name: nn.Parameter(parameter.detach()[outputs][:, inputs].clone(), requires_grad=False)
        for name, parameter in layer._parameters.items()
        if parameter is not None
    }
    some._buffers = {"grid": layer.grid[inputs].clone()}
    some._modules = dict(layer._modules)
    some.in_features, some.out_features = int(inputs.sum()), int(outputs.sum())
    return some
