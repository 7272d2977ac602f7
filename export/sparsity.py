"""Edges that count for little: what leaving them out would change, and a network without them.

How much an edge counts is said in curves.py. It is left out at a threshold if its importance is at
most that share of the largest in its layer: its base weight and its spline weights become zero, and
its mean over the same points is added to the layer's output as a constant. So an edge that is
constant on the samples changes nothing there when it goes. What is changed of the answers is
measured, in float64 where the network can run in it: on the samples, or else on random rows.

A pruned network is another function than the one that was trained. Nothing here says that it is
good enough.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from export.change import answer, choose_rows, measure_change
from export.curves import EdgeMoments, measure_edges, why_no_curves
from export.errors import InputError, refused_samples
from export.narrowing import (
    NarrowKAN,
    Nodes,
    OffsetLayer,
    can_be_narrowed,
    edges_of,
    find_nodes,
)
from export.network import Network, copy_module, describe_network
from export.parts import replace_modules
from export.reaching import find_constant_inputs, reaching
from kan_bundle.manifest import ChangeRecord, PrunedLayer, PruningRecord
from kan_bundle.scores import TargetsRecord
from kan_model import KAN
from kan_model.adoption import adopt

THRESHOLDS = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1)

_LEAST_SHARE = 1e-300  # of what varies


@dataclass(frozen=True)
class Sparsity:
    """What leaving out all edges at a threshold would do.

    Attributes:
        threshold: Share of the largest importance of a layer.
        layers: What is left of each.
        nodes_removed: Of a KAN: inputs, nodes of each hidden layer and outputs that can be done
            without; None of another network, or of one that is not narrowed (`can_be_narrowed`).
        change: What it changes of the answers; None if no way from an input to an output is left.
        targets: Scores of what is left, if there are targets.
    """

    threshold: float
    layers: tuple[PrunedLayer, ...]
    nodes_removed: tuple[int, ...] | None
    change: ChangeRecord | None
    targets: tuple[TargetsRecord, ...] = ()

    @property
    def zeroed(self) -> int:
        """Count the edges that are left out."""
        return sum(layer.zeroed for layer in self.layers)

    @property
    def edges(self) -> int:
        """Count all edges."""
        return sum(layer.edges for layer in self.layers)


def check_threshold(threshold: float) -> float:
    """Let a threshold pass at which something can be left.

    Raises:
        InputError: It is none.
    """
    if not (math.isfinite(threshold) and 0 <= threshold < 1):
        raise InputError(
            f"--prune: expected a share of the largest importance in a layer, from 0 to below 1, "
            f"found {threshold!r}"
        )
    return float(threshold)


def prune_network(network: Network, threshold: float) -> tuple[Network, Network, PruningRecord]:
    """Leave out the edges at a threshold, and measure what that changes.

    Args:
        network: It is copied, and not changed.
        threshold: As `check_threshold` takes it.

    Returns:
        The pruned network; one that computes the same, of a KAN without the nodes that are idle
        then, to be written; and what was done.

    Raises:
        InputError: The network has no KANLinear layer, or too little would be left of it.
        NetworkError: It fails on the samples.
    """
    pruning = _Pruning(network)
    found, nodes = pruning.leave_out(check_threshold(threshold))
    if found.change is None:
        empty = [layer.name for layer in found.layers if layer.zeroed == layer.edges]
        what = f"of {', '.join(empty)} nothing" if empty else "no way from an input to an output"
        raise InputError(
            f"--prune {threshold:g}: {what} would be left, and every answer would be the same; "
            "choose less ('inspect FILE --sparsity' shows what a threshold leaves)"
        )
    written = pruned = pruning.finish()
    if pruning.kan is not None and nodes is not None and any(nodes.removed):
        written = describe_network(NarrowKAN(pruning.kan, nodes).eval(), network.inputs)
    record = PruningRecord(threshold, found.layers, found.nodes_removed, found.change)
    return pruned, written, record


def prune_further(
    network: Network,
    thresholds: Sequence[float],
    score: Callable[[Network], tuple[TargetsRecord, ...]] = lambda network: (),
) -> Iterator[Sparsity]:
    """Leave out the edges at one threshold after the other.

    Args:
        network: It is copied, and not changed.
        thresholds: Rising.
        score: Scores what is left by targets.

    Raises:
        InputError: The network has no KANLinear layer, or one whose edges cannot be ranked.
        NetworkError: It fails on the samples.
    """
    pruning = _Pruning(network)
    for threshold in thresholds:
        found, _ = pruning.leave_out(threshold)
        yield replace(found, targets=score(pruning.network))


class _Pruning:
    """A copy of a network, from which edges are left out.

    Args:
        network: It is not changed.

    Attributes:
        network: The copy. Around each of its layers is an `OffsetLayer`, until it is finished.
        kan: The layers of the copy as a KAN in float32, if it is one whose nodes can be left out
            one by one.

    Raises:
        InputError: The network has no KANLinear layer, or one whose edges cannot be ranked.
        NetworkError: It fails on the samples.
    """

    def __init__(self, network: Network) -> None:
        _require_curves(network)
        copied = describe_network(copy_module(network.exact.module), network.inputs)
        self.network = replace(copied, notes=network.notes)
        self._edges, self._shares = _measure(self.network)
        self._rows, self._kind = choose_rows(self.network)
        self._before = answer(self.network, self._rows)
        self._already = {
            name: int((~edges_of(layer)).sum()) for name, layer in self.network.layers.items()
        }
        self.kan = _kan_to_write(self.network)
        self._modules = list(_in_every_precision(self.network))  # by the names they have now
        self._offsets = _add_offsets(self.network)

    def leave_out(self, threshold: float) -> tuple[Sparsity, Nodes | None]:
        """Leave out what lies at a threshold, which is at least that of the last time.

        Returns:
            What that did, and the nodes that are left.
        """
        out = {name: share <= threshold for name, share in self._shares.items()}
        means = {
            name: torch.where(out[name], edges.mean, 0.0).sum(dim=1)
            for name, edges in self._edges.items()
        }
        for name, module in self._modules:
            _set_zero(module, out[name])
        for name, offset_layer in self._offsets:
            offset_layer.offset.copy_(means[name])
        left = {name: edges_of(layer) for name, layer in self.network.layers.items()}
        layers = tuple(
            PrunedLayer(name, own.numel(), int((~own).sum()), self._already[name])
            for name, own in left.items()
        )
        nodes = None
        if self.kan is not None:
            nodes = find_nodes(self.kan, list(left.values()), list(means.values()))
        change = None
        if all(layer.zeroed < layer.edges for layer in layers) and (
            nodes is None or bool(nodes.varying[-1].any())
        ):
            after = answer(self.network, self._rows)
            change = measure_change(self.network, self._before, after, self._kind)
        removed = None if nodes is None else nodes.removed
        return Sparsity(threshold, layers, removed, change), nodes

    def finish(self) -> Network:
        """Take the `OffsetLayer`s away that add nothing, and give the network."""
        idle: dict[nn.Module, nn.Module] = {
            own: own.layer for _, own in self._offsets if not bool(own.offset.any())
        }
        for call in (self.network.call, self.network.exact):
            replace_modules(call, idle)
        return self.network


def _require_curves(network: Network) -> None:
    """Refuse a network whose edges cannot be ranked.

    Raises:
        InputError: It has no KANLinear layer, or the edges of one are no functions of one number.
    """
    if not network.layers:
        raise InputError(
            "--prune, --sparsity: they are about the edges of KANLinear layers, and the network "
            "has none; leave them out"
        )
    for name, layer in network.layers.items():
        why = why_no_curves(layer)
        if why is not None:
            raise InputError(
                f"--prune, --sparsity: the base activation of {name} {why}, so its edges are no "
                "functions of one number; leave them out"
            )


def _measure(network: Network) -> tuple[Mapping[str, EdgeMoments], Mapping[str, Tensor]]:
    """Measure the edges of every layer, and express their importance as shares of the largest.

    Where samples do not vary among the rows that are taken of them, all are looked at: an input
    that varies in a few rows alone is not constant.
    """
    samples = network.inputs.samples
    try:  # the rows that report.html tells of
        reached = {} if samples is None else reaching(network, samples)
        measured = {
            name: measure_edges(layer, reached.get(name)) for name, layer in network.layers.items()
        }
        seem_constant = any(
            bool(((edges.deviation == 0) & edges_of(network.layers[name])).any())
            for name, edges in measured.items()
            if name in reached
        )
        constant: Mapping[str, Tensor] = {}
        if samples is not None and seem_constant:
            constant = find_constant_inputs(network, samples)
    except Exception as error:  # the network's own code may fail in any way
        raise refused_samples(error) from error
    shares = {}
    for name, edges in measured.items():
        share = _share(name, edges.deviation, sampled=name in reached)
        if name in constant:
            varies = edges_of(network.layers[name]) & ~constant[name]
            share = torch.where(varies, share.clamp_min(_LEAST_SHARE), share)
        shares[name] = share
    return measured, shares


def _add_offsets(network: Network) -> list[tuple[str, OffsetLayer]]:
    """Put an `OffsetLayer` of zeros around every layer, in place; list them by name."""
    found = []
    own = {module: name for name, module in network.replaced.items()}
    around: dict[nn.Module, nn.Module] = {}
    if network.exact is not network.call:
        own |= {module: name for name, module in _in_exact(network)}
    for module, name in own.items():
        in_call = network.replaced[name] is module
        dtype = torch.float32 if in_call else torch.float64
        zeros = torch.zeros(network.layers[name].out_features, dtype=dtype)
        offset_layer = OffsetLayer(module, zeros)
        around[module] = offset_layer
        found.append((name, offset_layer))
    replace_modules(network.call, around)
    if network.exact is not network.call:
        replace_modules(network.exact, around)
    return found


def _share(name: str, found: Tensor, *, sampled: bool) -> Tensor:
    """Express importances as shares of the largest, shape (out, in).

    Raises:
        InputError: They mean nothing, or there is none.
    """
    if not bool(torch.isfinite(found).all()):
        count = int((~torch.isfinite(found)).sum())
        raise InputError(
            f"--prune, --sparsity: the importance of {count:,} of {found.numel():,} edges of "
            f"{name} is not finite: its base activation or its splines overflow, or give NaN, "
            + ("with the samples" if sampled else "on the grid")
            + "; give rows that it takes with --samples, or leave them out"
        )
    largest = float(found.max())
    if largest == 0:
        raise InputError(
            f"--prune, --sparsity: no edge of {name} varies "
            + (
                "over what reaches it with the samples: they do not vary, or the layer has no "
                "weights; give other --samples"
                if sampled
                else "over its grid: the layer has no weights, or is constant; train it"
            )
            + ", or leave them out"
        )
    return found / largest


def _in_every_precision(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """List the layers by name, as ours, as the network's own, and in its own precision.

    A layer of ours shares the tensors of the one that it stands for, until that is converted:
    parameters stay what they are, but buffers are made anew.
    """
    yield from network.layers.items()
    yield from network.replaced.items()
    if network.exact is not network.call:
        yield from _in_exact(network)


def _in_exact(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """List the layers of the network in its own precision, by name."""
    for name, child in network.exact.module.named_modules():
        own = name or type(child).__name__
        if own in network.layers and adopt(child) is not None:
            yield own, child


@torch.no_grad()
def _set_zero(layer: nn.Module, edges: Tensor) -> None:
    """Make weights zero, in place: other layers may hold the same tensors."""
    for weight, mask in (
        (layer.base_weight, edges),
        (layer.spline_weight, edges[..., None]),
    ):
        assert isinstance(weight, Tensor)
        weight.masked_fill_(mask, 0)


def _kan_to_write(network: Network) -> KAN | None:
    """Take the layers in float32, if they are a KAN whose nodes can be left out one by one."""
    module = network.call.module
    if network.kan is not None and isinstance(module, KAN) and can_be_narrowed(module):
        return KAN.from_layers(list(module.layers))
    return None
