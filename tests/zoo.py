"""Layers of other projects that hold what efficient-KAN's does, written anew from its formulas.

They stand for the copies of it that people have: what they hold is the same to the name, how they
compute is theirs. `vendored` gives them any module path, as a copied file has.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class KANLinear(nn.Module):
    """efficient-KAN's layer: einsum over the edges, so that it shares no code with ours."""

    grid: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        base_activation: Any = nn.SiLU,
        scaler: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order = grid_size, spline_order
        self.enable_standalone_scale_spline = scaler
        step = 2 / grid_size
        knots = torch.arange(-spline_order, grid_size + spline_order + 1) * step - 1
        self.register_buffer("grid", knots.expand(in_features, -1).contiguous())
        self.base_weight = nn.Parameter(torch.randn(out_features, in_features) / in_features)
        shape = (out_features, in_features, grid_size + spline_order)
        self.spline_weight = nn.Parameter(torch.randn(shape) / in_features)
        if scaler:
            self.spline_scaler = nn.Parameter(torch.rand(out_features, in_features) + 0.5)
        self.base_activation = base_activation()

    def basis(self, x: Tensor) -> Tensor:
        grid = self.grid
        x = x.unsqueeze(-1)
        bases = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.spline_order + 1):
            left = (x - grid[:, : -k - 1]) / (grid[:, k:-1] - grid[:, : -k - 1])
            right = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:-k])
            bases = left * bases[..., :-1] + right * bases[..., 1:]
        return bases

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.spline_weight
        if self.enable_standalone_scale_spline:
            weight = weight * self.spline_scaler.unsqueeze(-1)
        base = torch.einsum("...i,oi->...o", self.base_activation(x), self.base_weight)
        return base + torch.einsum("...in,oin->...o", self.basis(x), weight)


class GuardedKANLinear(KANLinear):
    """The fork whose forward looks at the values: it cannot be traced as it is."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise ValueError("x must contain only finite values")
        return super().forward(x)


class MaskedKANLinear(KANLinear):
    """efficient-kan-plus, with its mask of edges that are symbolic functions."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("symbolic_mask", torch.zeros(out_features, in_features))


class ClampedKANLinear(KANLinear):
    """Holds the same and computes something else, outside the grid alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-1, 1))


class KAN(nn.Module):
    """efficient-KAN's network."""

    layers: Any

    def __init__(self, widths: list[int], layer: Any = KANLinear, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(a, b, **options) for a, b in pairwise(widths))

    def forward(self, x: Tensor, update_grid: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@contextmanager
def vendored(module: str) -> Iterator[None]:
    """Pretend for a while that `KAN` and `KANLinear` are defined in a module of this name."""
    parts = module.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    before = {name: sys.modules.get(name) for name in names}
    stand_in = types.ModuleType(module)
    stand_in.KAN, stand_in.KANLinear = KAN, KANLinear  # type: ignore[attr-defined]
    sys.modules |= {name: types.ModuleType(name) for name in names[:-1]} | {module: stand_in}
    home = KAN.__module__
    KAN.__module__ = KANLinear.__module__ = module
    try:
        yield
    finally:
        KAN.__module__ = KANLinear.__module__ = home
        for name, found in before.items():
            if found is None:
                del sys.modules[name]
            else:
                sys.modules[name] = found


# Factories for --model.


class ConvNet(nn.Module):
    """Convolutions with two layers of KAN for their head."""

    def __init__(self, layer: type[KANLinear] = KANLinear) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3))
        self.fc1, self.fc2 = layer(4 * 2 * 2, 6), layer(6, 2)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.drop(torch.tanh(self.fc1(self.features(x).flatten(1)))))
        return y


class Attention(nn.Module):
    """Two inputs, one of them whole numbers, and two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix, self.head = KANLinear(8, 8), KAN([8, 5, 3])

    def forward(self, tokens: Tensor, age: Tensor) -> dict[str, Tensor]:
        x = self.embedding(tokens)
        x = self.mix(x + self.attention(x, x, x, need_weights=False)[0])
        pooled = x.mean(1) + age
        return {"logits": self.head(pooled), "pooled": pooled}


class Flattening(nn.Module):
    """A KAN behind a flatten, as image classifiers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KAN([12, 4, 2])

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.kan(image.flatten(1))
        return y


def conv_net() -> ConvNet:
    torch.manual_seed(1)
    return ConvNet()


def guarded_net() -> ConvNet:
    torch.manual_seed(1)
    return ConvNet(GuardedKANLinear)


def clamped_net() -> ConvNet:
    torch.manual_seed(1)
    return ConvNet(ClampedKANLinear)


def attention_net() -> Attention:
    torch.manual_seed(2)
    return Attention()


def flattening_net() -> Flattening:
    torch.manual_seed(3)
    return Flattening()


def failing_net() -> nn.Module:
    raise RuntimeError("no such dataset")


def talking_net() -> ConvNet:
    print("a factory may print")
    return conv_net()


NO_NETWORK = dict  # a factory that makes something else
