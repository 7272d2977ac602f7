"""KANLinear as projects have it beside their network: efficient-KAN's, with its manners.

It flattens what it is given to rows, asserts what it expects, and has its scaled weights as a
property. https://github.com/Blealtan/efficient-kan is what it follows; the code is our own.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class KANLinear(nn.Module):
    grid: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        base_activation: Callable[[], nn.Module] = nn.SiLU,
        grid_range: Sequence[float] = (-1.0, 1.0),
        enable_standalone_scale_spline: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order = grid_size, spline_order
        self.enable_standalone_scale_spline = enable_standalone_scale_spline
        step = (grid_range[1] - grid_range[0]) / grid_size
        knots = torch.arange(-spline_order, grid_size + spline_order + 1) * step + grid_range[0]
        self.register_buffer("grid", knots.expand(in_features, -1).contiguous())
        size = grid_size + spline_order
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.spline_weight = nn.Parameter(torch.empty(out_features, in_features, size))
        if enable_standalone_scale_spline:
            self.spline_scaler = nn.Parameter(torch.empty(out_features, in_features))
        self.base_activation = base_activation()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
        nn.init.normal_(self.spline_weight, std=1 / math.sqrt(self.in_features))
        if self.enable_standalone_scale_spline:
            nn.init.uniform_(self.spline_scaler, 0.5, 1.5)

    def b_splines(self, x: Tensor) -> Tensor:
        assert x.dim() == 2
        assert x.size(1) == self.in_features
        x = x.unsqueeze(-1)
        bases = ((x >= self.grid[:, :-1]) & (x < self.grid[:, 1:])).to(x.dtype)
        for k in range(1, self.spline_order + 1):
            start, end = self.grid[:, : -(k + 1)], self.grid[:, k + 1 :]
            rising = (x - start) / (self.grid[:, k:-1] - start) * bases[:, :, :-1]
            falling = (end - x) / (end - self.grid[:, 1:-k]) * bases[:, :, 1:]
            bases = rising + falling
        return bases.contiguous()

    @property
    def scaled_spline_weight(self) -> Tensor:
        return self.spline_weight * (
            self.spline_scaler.unsqueeze(-1) if self.enable_standalone_scale_spline else 1.0
        )

    def forward(self, x: Tensor) -> Tensor:
        assert x.size(-1) == self.in_features
        leading = x.shape[:-1]
        x = x.reshape(-1, self.in_features)
        base = functional.linear(self.base_activation(x), self.base_weight)
        spline = functional.linear(
            self.b_splines(x).view(x.size(0), -1),
            self.scaled_spline_weight.view(self.out_features, -1),
        )
        return (base + spline).reshape(*leading, self.out_features)


class KAN(nn.Module):
    def __init__(self, layers_hidden: Sequence[int], grid_size: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KANLinear(a, b, grid_size) for a, b in pairwise(layers_hidden))

    def forward(self, x: Tensor, update_grid: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class KANConv2d(nn.Module):
    """One KANLinear over the unfolded patches (convkan)."""

    def __init__(
        self,
        into: int,
        out: int,
        size: int = 3,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.size, self.stride, self.padding, self.dilation = size, stride, padding, dilation
        self.out = out
        self.kan_layer = KANLinear(into * size * size, out)

    def forward(self, x: Tensor) -> Tensor:
        patches = functional.unfold(
            x, self.size, padding=self.padding, stride=self.stride, dilation=self.dilation
        )
        batch, channels, count = patches.shape
        rows = patches.permute(0, 2, 1).reshape(batch * count, channels)
        y = self.kan_layer(rows).reshape(batch, count, -1).permute(0, 2, 1)
        reach = self.dilation * (self.size - 1) + 1
        height = (x.shape[2] + 2 * self.padding - reach) // self.stride + 1
        width = (x.shape[3] + 2 * self.padding - reach) // self.stride + 1
        return y.view(x.shape[0], self.out, height, width)


class KernelsConv2d(nn.Module):
    """One KANLinear for each kernel and channel, columns filled in place (Convolutional-KANs)."""

    def __init__(self, into: int, n_convs: int, size: int = 3) -> None:
        super().__init__()
        self.into, self.size = into, size
        self.convs = nn.ModuleList(KANLinear(size * size, 1) for _ in range(into * n_convs))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        height, width = height - self.size + 1, width - self.size + 1
        patches = functional.unfold(x, self.size).view(batch, channels, self.size**2, -1)
        patches = patches.transpose(2, 3)
        out = torch.zeros((batch, len(self.convs) // channels, height, width), device=x.device)
        for place, conv in enumerate(self.convs):
            rows = patches[:, place % channels].flatten(0, 1)
            out[:, place // channels] += conv(rows).view(batch, height, width)
        return out
