"""Edges that count for little: what leaving them out would change, and a network without them.

How much an edge counts is said in curves.py. It is left out at a threshold if its importance is at
most that share of the largest in its layer: its base weight and its spline weights become zero, and
with them the mean that it may have had. What that changes of the answers is measured, in float64
where the network can run in it: on the samples, or else on random rows.

A pruned network is another function than the one that was trained. Nothing here says that it is
good enough.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.curves import importance, why_no_curves
from export.errors import InputError, NetworkError, cause, refused_samples
from export.narrowing import NarrowKAN, Nodes, can_be_narrowed, edges_of, find_nodes
from export.network import Arrays, Network, describe_network
from export.probes import ORDINARY, make_probes
from export.proof.eager import LARGEST_BATCH, evaluate, in_double
from export.reaching import reaching
from kan_bundle.manifest import ChangeRecord, PrunedLayer, PruningRecord
from kan_model import KAN
from kan_model.adoption import adopt

THRESHOLDS = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1)

_ROWS, _FEWEST_ROWS = 1024, 16
_NUMBERS = 2**22  # of all rows that are compared, on a network's larger side
_BATCH = 2**18  # numbers at a time


@dataclass(frozen=True)
class Sparsity:
    """What leaving out all edges at a threshold would do.

    Attributes:
        threshold: Share of the largest importance of a layer.
        layers: What is left of each.
        nodes_removed: Of a KAN: inputs, nodes of each hidden layer and outputs that can be done
            without; None of another network, or of one that is not narrowed (`can_be_narrowed`).
        change: What it changes of the answers; None if no way from an input to an output is left.
    """

    threshold: float
    layers: tuple[PrunedLayer, ...]
    nodes_removed: tuple[int, ...] | None
    change: ChangeRecord | None

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


def prune_network(network: Network, threshold: float) -> tuple[Network, PruningRecord]:
    """Leave out the edges at a threshold, in place, and measure what that changes.

    Returns:
        A network that computes the same as the pruned one, of a KAN without the nodes that are
        idle then; and what was done.

    Raises:
        InputError: The network has no KANLinear layer, or too little would be left of it.
        NetworkError: It fails on the samples.
    """
    ((found, nodes),) = _steps(network, [check_threshold(threshold)])
    if found.change is None:
        empty = [layer.name for layer in found.layers if layer.zeroed == layer.edges]
        what = f"of {', '.join(empty)} nothing" if empty else "no way from an input to an output"
        raise InputError(
            f"--prune {threshold:g}: {what} would be left, and every answer would be the same; "
            "choose less ('inspect FILE --sparsity' shows what a threshold leaves)"
        )
    written = network
    kan = _kan_to_write(network)
    if kan is not None and nodes is not None and any(nodes.removed):
        written = describe_network(NarrowKAN(kan, nodes).eval(), network.inputs)
    record = PruningRecord(threshold, found.layers, found.nodes_removed, found.change)
    return written, record


def prune_further(network: Network, thresholds: Sequence[float]) -> Iterator[Sparsity]:
    """Leave out the edges at one threshold after the other, in place.

    Args:
        network: Is changed with every step.
        thresholds: Rising.

    Raises:
        InputError: The network has no KANLinear layer, or one whose edges cannot be ranked.
        NetworkError: It fails on the samples.
    """
    for found, _ in _steps(network, thresholds):
        yield found


def measure_change(before: Network, after: Network) -> ChangeRecord:
    """Measure how far the answers of one network are from those of another with the same inputs.

    Raises:
        NetworkError: One of them fails on the samples.
    """
    rows, kind = _choose_rows(before)
    return _compare(before, _answers(before, rows), _answers(after, rows), kind)


def _steps(
    network: Network, thresholds: Sequence[float]
) -> Iterator[tuple[Sparsity, Nodes | None]]:
    """Do the above, and give the nodes that are left at each step."""
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
    try:  # the rows that report.html tells of
        samples = network.inputs.samples
        reached = {} if samples is None else reaching(network, samples)
    except Exception as error:  # the network's own code may fail in any way
        raise refused_samples(error) from error
    shares = {
        name: _share(name, importance(layer, reached.get(name)), sampled=name in reached)
        for name, layer in network.layers.items()
    }
    rows, kind = _choose_rows(network)
    before = _answers(network, rows)
    already = {name: int((~edges_of(layer)).sum()) for name, layer in network.layers.items()}
    for threshold in thresholds:
        for name, module in _in_every_precision(network):
            _leave_out(module, shares[name] <= threshold)
        edges = {name: edges_of(layer) for name, layer in network.layers.items()}
        layers = tuple(
            PrunedLayer(name, own.numel(), int((~own).sum()), already[name])
            for name, own in edges.items()
        )
        kan = _kan_to_write(network)
        nodes = None if kan is None else find_nodes(kan, list(edges.values()))
        change = None
        if all(layer.zeroed < layer.edges for layer in layers) and (
            nodes is None or bool(nodes.varying[-1].any())
        ):
            change = _compare(network, before, _answers(network, rows), kind)
        yield Sparsity(threshold, layers, None if nodes is None else nodes.removed, change), nodes


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
        for name, child in network.exact.module.named_modules():
            own = name or type(child).__name__
            if own in network.layers and adopt(child) is not None:
                yield own, child


@torch.no_grad()
def _leave_out(layer: nn.Module, edges: Tensor) -> None:
    """Make weights zero, in place: the tensors are those of the user's own layer."""
    for weight, mask in (
        (layer.base_weight, edges),
        (layer.spline_weight, edges[..., None]),
    ):
        assert isinstance(weight, Tensor)
        weight.masked_fill_(mask, 0)


def _kan_to_write(network: Network) -> KAN | None:
    """Take the network in float32, if it is a KAN whose nodes can be left out one by one."""
    module = network.call.module
    if network.kan is not None and isinstance(module, KAN) and can_be_narrowed(module):
        return module
    return None


def _choose_rows(network: Network) -> tuple[Arrays, Literal["samples", "grid", "random"]]:
    """Take rows of the samples, or make some within the grid of the first layer, or just some."""
    specs = network.inputs.specs
    numbers = max(sum(math.prod(s.shape[1:]) for s in own) for own in (specs, network.outputs))
    most = int(np.clip(_NUMBERS // numbers, _FEWEST_ROWS, _ROWS))
    samples = network.inputs.samples
    if samples is not None:
        chosen = np.unique(np.linspace(0, len(samples[0]) - 1, most).astype(int))
        return tuple(array[chosen] for array in samples), "samples"
    if network.leading is not None:
        layer = network.layers[network.leading]
        k = layer.spline_order
        low, high = layer.grid[:, k].numpy(), layer.grid[:, k + layer.grid_size].numpy()
        rng = np.random.default_rng(0)
        rows = rng.uniform(low, high, (most, layer.in_features)).astype(np.float32)
        return (rows.reshape(-1, *specs[0].shape[1:]),), "grid"
    probes = make_probes(network.inputs)
    return probes.take(np.isin(probes.groups, ORDINARY)).inputs, "random"


def _answers(network: Network, rows: Arrays) -> NDArray[np.float64]:
    """Run the network in float64, or in float32 if it insists on it."""
    batch = int(np.clip(_BATCH // max(array[0].size for array in rows), 1, LARGEST_BATCH))
    try:
        in_single = evaluate(network.call, tuple(rows), batch)
        try:
            with in_double(network.exact) as call:
                return evaluate(call, tuple(rows), batch, torch.float64)
        except Exception:  # it has run in float32, so it is float64 that it does not take
            return in_single
    except Exception as error:  # the network's own code may fail in any way
        if network.inputs.samples is not None:
            raise refused_samples(error) from error
        raise NetworkError(f"the network fails on ordinary rows: {cause(error)}") from error


def _compare(
    network: Network,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    on: Literal["samples", "grid", "random"],
) -> ChangeRecord:
    numbers = np.isfinite(before) & np.isfinite(after)
    off = np.where(numbers, after - before, 0.0)
    count = max(1, int(numbers.sum()))
    same = None
    if len(network.outputs) == 1 and len(network.outputs[0].shape) == 2 and before.shape[1] > 1:
        same = float((before.argmax(axis=1) == after.argmax(axis=1)).mean())
    return ChangeRecord(
        on=on,
        rows=len(before),
        largest=float(np.abs(off).max()),
        typical=math.sqrt(float((off**2).sum()) / count),
        size=math.sqrt(float((np.where(numbers, before, 0.0) ** 2).sum()) / count),
        same_argmax=same,
    )
