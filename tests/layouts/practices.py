"""Habits that are no layout: hooks, properties, pruning, dtypes, numpy on sizes, own functions."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.layouts.efficient_kan import KAN, KANLinear
from tests.layouts.layout import Layout, seeded


class _SumOfKANs(nn.Module):
    """A residual of KANs with dropout; a learned scale is a property (residual KAN heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kans = nn.Linear(5, 6), nn.ModuleList(KANLinear(6, 6) for _ in range(3))
        self.scale, self.drop = nn.Parameter(torch.tensor(0.5)), nn.Dropout(0.3)
        self.classes = ["a", "b", "c"]

    @property
    def temperature(self) -> Tensor:
        return self.scale.exp() + 1e-3

    @property
    def names(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i in range(len(self.kans)):
            h = h + self.drop(self.kans[i](h))
        return h[:, : len(self.names)] / self.temperature


def properties() -> nn.Module:
    return seeded(_SumOfKANs)


def hooked() -> nn.Module:
    """Hooks that record activations of every layer, as feature extraction has them."""
    network = seeded(lambda: KAN([4, 6, 3]))
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        return lambda module, given, found: seen.__setitem__(name, found.detach())

    for name, layer in network.named_modules():
        if isinstance(layer, KANLinear):
            layer.register_forward_hook(record(name))
    return network


def pruned() -> nn.Module:
    """torch.nn.utils.prune on the splines and on a Linear."""

    def make() -> nn.Module:
        network = nn.Sequential(nn.Linear(6, 6), KANLinear(6, 8), KANLinear(8, 2))
        prune.random_unstructured(network[0], "weight", amount=0.3)
        for layer in (network[1], network[2]):
            prune.l1_unstructured(layer, "spline_weight", amount=0.5)
            prune.ln_structured(layer, "base_weight", amount=0.25, n=2, dim=1)
        return network

    return seeded(make)


def pruned_state() -> nn.Module:
    """The unpruned network, for a state dict with `_orig` and `_mask`."""
    return seeded(lambda: nn.Sequential(nn.Linear(6, 6), KANLinear(6, 8), KANLinear(8, 2)))


class _Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x)


def parametrized() -> nn.Module:
    """Weight norm on base weights, monotone spline weights by a parametrization."""

    def make() -> nn.Module:
        network = nn.Sequential(KANLinear(5, 6), KANLinear(6, 3))
        parametrizations.weight_norm(network[0], "base_weight")
        parametrize.register_parametrization(network[1], "spline_weight", _Positive())
        parametrizations.orthogonal(network[1], "base_weight")
        return network

    return seeded(make)


def double_trained() -> nn.Module:
    """Trained in float64, as PINNs are."""
    return seeded(lambda: KAN([3, 8, 2])).double()


def bfloat16_saved() -> nn.Module:
    """Cast to bfloat16 to be saved, its grids too."""
    network = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), KAN([6, 5, 2])))
    return network.bfloat16().float()


def autocast_inside() -> nn.Module:
    """forward turns autocast off, and casts what comes to float (mixed-precision training)."""
    return seeded(_Autocast)


class _Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kan = nn.Linear(4, 5), KAN([5, 4, 2])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self.kan(h.float())


class _NumpySizes(nn.Module):
    """numpy on sizes: square sides, padding and scale computed from shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.kan, self.head = KANLinear(3, 4), KANLinear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        side = int(np.sqrt(count))
        pad = int(np.ceil(side / 4) * 4 - side)
        x = tokens.transpose(1, 2).reshape(batch, dim, side, side)
        x = nn.functional.pad(x, (0, pad, 0, pad))
        scale = np.float32(1.0 / np.sqrt(np.prod(np.array(x.shape[2:]))))
        h = self.kan(x.permute(0, 2, 3, 1).reshape(batch, -1, dim)).sum(1) * float(scale)
        return self.head(h / math.sqrt(dim))


def numpy_sizes() -> nn.Module:
    return seeded(_NumpySizes)


class _StraightThrough(torch.autograd.Function):
    """1 - tanh squared with a gradient of its own, as faster-kan has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = 1 - torch.tanh(x) ** 2
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * -2 * torch.tanh(x) / torch.cosh(x) ** 2


class _OwnFunction(nn.Module):
    """A torch.autograd.Function between KANs (faster-kan's basis, straight-through rounding)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = KANLinear(4, 6), KANLinear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(_StraightThrough.apply(self.first(x)))  # type: ignore[no-untyped-call]


def own_function() -> nn.Module:
    return seeded(_OwnFunction)


class _Depths(nn.Module):
    """Layers chosen by integers of a configuration, and skipped ones, in lists and dicts."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        widths = config["widths"]
        self.layers = nn.ModuleDict(
            {f"kan_{i}": KANLinear(widths[i], widths[i + 1]) for i in range(len(widths) - 1)}
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths[1:])

    def forward(self, x: Tensor) -> list[Tensor]:
        outs = []
        for i in range(len(self.layers)):
            x = self.layers[f"kan_{i}"](x)
            if self.config["norm"][i]:
                x = self.norms[i](x)
            if i in self.config["out"]:
                outs.append(x)
        return outs


def chosen_layers() -> nn.Module:
    """Unused batch norms, a list of outputs."""
    config = {"widths": [5, 6, 6, 2], "norm": (True, False, False), "out": {1, 2}}
    return seeded(lambda: _Depths(config))


class _Caching(nn.Module):
    """Keeps its last features as an attribute and counts in a buffer (streaming demos)."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kan, self.head = KANLinear(4, 5), KANLinear(5, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.kan(x)
        self.calls += 1
        return self.head(self.features)


def caching() -> nn.Module:
    return seeded(_Caching)


class _Checkpointed(nn.Module):
    """torch.utils.checkpoint around a KAN block, to save memory while training."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = KAN([5, 8, 5]), KANLinear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        return self.head(x + h)


def checkpointed() -> nn.Module:
    return seeded(_Checkpointed)


class _Printing(nn.Module):
    """Asserts on shapes, prints them, and looks at a value of the batch (left-over debugging)."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks, self.kan = looks, KAN([4, 5, 2])

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2, f"expected rows, found {x.shape}"
        y = self.kan(x)
        if self.looks and torch.isnan(y).any():
            print("NaN in", x.shape)
        return y


def debugging() -> nn.Module:
    return seeded(lambda: _Printing(looks=True))


def debugged() -> nn.Module:
    return seeded(lambda: _Printing(looks=False))


class _Varargs(nn.Module):
    """forward(net, *inputs), all joined: what cannot be named (a KAN-GRU of DROID-SLAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kan = nn.Conv2d(5, 4, 1), KANLinear(4, 4)

    def forward(self, net: Tensor, *inputs: Tensor) -> Tensor:
        z = self.conv(torch.cat(inputs, dim=1))
        pooled = (torch.sigmoid(net) * net).view(*net.shape[:2], -1).mean(-1)
        gate = torch.sigmoid(z + self.kan(pooled).view(*net.shape[:2], 1, 1))
        return (1 - gate) * net + gate * torch.tanh(z)


def varargs() -> nn.Module:
    return seeded(_Varargs)


def varargs_with_own_names() -> nn.Module:
    return seeded(_Varargs)


def _as_bfloat16(network: nn.Module) -> Any:
    return {name: tensor.bfloat16() for name, tensor in network.state_dict().items()}


def _lightning(network: nn.Module) -> Any:
    return {"epoch": 3, "state_dict": {f"net.{k}": v for k, v in network.state_dict().items()}}


def lightning() -> nn.Module:
    """A checkpoint of Lightning's, with a prefix."""
    return seeded(lambda: nn.Sequential(KAN([4, 6, 3]), nn.Softmax(dim=-1)))


def _pruned_state(network: nn.Module) -> Any:
    prune.random_unstructured(network[0], "weight", amount=0.3)  # type: ignore[index]
    prune.l1_unstructured(network[1], "spline_weight", amount=0.5)  # type: ignore[index]
    state = network.state_dict()
    prune.remove(network[0], "weight")  # type: ignore[index]
    prune.remove(network[1], "spline_weight")  # type: ignore[index]
    return {name: tensor.clone() for name, tensor in state.items()}


LAYOUTS = (
    Layout(properties, 3, shape=5),
    Layout(hooked, 2, shape=4),
    Layout(pruned, 2, shape=6),
    Layout(pruned_state, 2, shape=6, save=_pruned_state),
    Layout(parametrized, 2, shape=5),
    Layout(double_trained, 2, shape=3),
    Layout(bfloat16_saved, 2, shape=4, save=_as_bfloat16),
    Layout(autocast_inside, 2, shape=4),
    Layout(numpy_sizes, 2, shape=(9, 3)),
    Layout(own_function, 2, shape=4),
    Layout(chosen_layers, 3, shape=5),
    Layout(caching, 2, shape=4),
    Layout(checkpointed, 3, shape=5),
    Layout(
        debugging,
        2,
        shape=4,
        refusal="no branch on values",
        remedy=Layout(debugged, 2, shape=4),
    ),
    Layout(
        varargs,
        1,
        shape={"net": (4, 5, 5), "a": (2, 5, 5), "b": (3, 5, 5)},
        refusal="names of your own for every input",
        remedy=Layout(
            varargs_with_own_names, 1, shape={"state": (4, 5, 5), "a": (2, 5, 5), "b": (3, 5, 5)}
        ),
    ),
    Layout(lightning, 2, shape=4, save=_lightning),
)
