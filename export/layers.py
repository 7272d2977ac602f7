"""The efficient-KAN layers of a network: found by what they hold, accepted by what they compute."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from export.errors import NetworkError
from export.parts import swapped
from export.probes import make_kan_probes
from kan_model import KANLinear, KanModelError
from kan_model.adoption import adopt, is_altered
from kan_model.stacks import Layer, Stack
from kan_model.state_dict import check_values

Run = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]
"""Runs a network on inputs, and gives its outputs."""

_ROWS_PER_GROUP = 4  # of the comparison of one layer
_SAME = 1e-4  # share of the largest output by which two float32 layers may differ there


@dataclass(frozen=True)
class FoundLayers:
    """KANLinear layers of a network.

    Attributes:
        ours: As ours, over the same tensors, by name.
        originals: The modules that these stand for, by name.
        notes: What the user should know about others that only seem to be such layers.
    """

    ours: dict[str, KANLinear] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave(self, name: str) -> None:
        """Take a layer out: it is exported as it is written."""
        del self.ours[name], self.originals[name]
        self.notes.append(
            f"{name} holds what a KANLinear holds, but computes something else: it is exported as "
            "it is written"
        )

    def leave_all(self) -> None:
        """Take all layers out of a network that computes gradients through them."""
        if self.ours:
            self.notes.append(
                f"the network computes gradients in its forward: {', '.join(self.ours)} and all "
                "else are exported as they are written"
            )
        self.ours.clear()
        self.originals.clear()


def find_layers(module: nn.Module) -> FoundLayers:
    """Find the layers of a network that compute what a KANLinear computes.

    Args:
        module: In float32, in evaluation mode. Not changed; the layers run.

    Raises:
        NetworkError: A layer of ours holds values that mean nothing.
    """
    found = FoundLayers()
    for path, child in module.named_modules():
        layer = adopt(child)
        if layer is None:
            continue
        name = path or type(child).__name__
        try:
            _check_values(name, layer)
        except KanModelError as error:
            if type(child) is KANLinear:
                raise NetworkError(str(error)) from error
            found.notes.append(
                f"{name} holds what a KANLinear holds, and knots for which a KANLinear is "
                "undefined: it is exported as it is written"
            )
            continue
        found.ours[name], found.originals[name] = layer, child
        if layer is not child and not _computes_the_same(child, layer):
            found.leave(name)
    return found


@torch.no_grad()
def leave_needed_hooks(
    root: nn.Module, found: FoundLayers, run: Run, rows: tuple[Tensor, ...]
) -> None:
    """Keep layers as written of which a hook has an effect elsewhere in the network.

    A hook that only looks is left out with its layer. One that stores what the rest of the network
    reads is not to be left out, which shows in the network's answers without it.

    Args:
        root: The network.
        found: Its layers; changed.
        run: Runs the network.
        rows: Inputs that it takes.
    """
    hooked = [name for name, child in found.originals.items() if is_altered(child)]
    if not hooked:
        return
    expected = run(rows)
    run(tuple(row[:1] for row in rows))  # what a hook has stored is of other rows now
    forms: Mapping[nn.Module, nn.Module] = {
        found.originals[name]: found.ours[name] for name in hooked
    }
    with swapped(root, forms):
        try:
            same = all(
                a.shape == b.shape and torch.allclose(a, b, rtol=_SAME, atol=_SAME, equal_nan=True)
                for a, b in zip(run(rows), expected, strict=True)
            )
        except Exception:  # the network's own code may fail in any way
            same = False
    if not same:
        for name in hooked:
            found.leave(name)


@torch.no_grad()
def _computes_the_same(original: nn.Module, ours: KANLinear) -> bool:
    """Compare two layers at the knots, inside, in the margins and outside."""
    knots = ours.grid.float().numpy()
    probes = make_kan_probes(knots, ours.spline_order, rows_per_group=_ROWS_PER_GROUP)
    finite = np.isfinite(probes.inputs[0]).all(axis=1)
    x = torch.from_numpy(probes.inputs[0]).to(ours.grid.dtype)
    try:
        theirs = original(x[finite])
    except Exception:  # it wants something else, so it is something else
        return False
    mine = ours(x[finite])
    if not isinstance(theirs, Tensor) or theirs.shape != mine.shape:
        return False
    size = mine.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    if not bool(((theirs - mine).abs() <= _SAME * size).all()):
        return False
    try:
        swallows = not bool(torch.equal(original(x[~finite]).isnan(), ours(x[~finite]).isnan()))
    except Exception:  # some refuse NaN, which the exported form answers with NaN
        swallows = False
    return not swallows


def _check_values(name: str, layer: KANLinear) -> None:
    tensors = {key: tensor.detach() for key, tensor in layer.state_dict().items()}
    check_values(Stack("", {0: Layer(f"{name}.", tensors)}))
