"""KANLinear layers to the form that is exported, which keeps its precision in every runtime.

The untouched network stays the reference; nothing here is trusted without the comparison in
parity.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from export.network import Call, Network, swapped
from kan_model import KANLinear
from kan_model.splines import b_spline_basis


class ExpSiLU(nn.Module):
    """SiLU as x / (1 + exp(-x)), which keeps its relative precision for negative x.

    onnxruntime's Sigmoid on CPU is a rational approximation with a constant absolute error: in
    1.32.0 x * Sigmoid(x) is off by 2e-3 of its value at x = -10 and by all of it beyond -20, where
    this form keeps 1.4e-7 and 1.7e-7, as torch does. Large weights make the difference visible.
    It costs 0.1 ms on 256 x 784 values, of 39 ms for such a layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to each element; shape (...) to (...)."""
        return x / (1 + torch.exp(-x))


class LoweredKANLinear(nn.Module):
    """A KANLinear for inference: the scaler is folded into the spline weights, once.

    Args:
        layer: In float32. Its other tensors are shared.
    """

    grid: Tensor
    base_weight: Tensor
    spline_weight: Tensor

    def __init__(self, layer: KANLinear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.spline_order = layer.spline_order
        silu = type(layer.base_activation) is nn.SiLU
        self.base_activation = ExpSiLU() if silu else layer.base_activation
        self.register_buffer("grid", layer.grid)
        self.register_buffer("base_weight", layer.base_weight.detach())
        self.register_buffer("spline_weight", layer.scaled_spline_weight.detach().flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; shape (..., in) to (..., out)."""
        if x.dim() != 2:
            y: Tensor = self(x.reshape(-1, self.in_features))
            return y.reshape(*x.shape[:-1], self.out_features)
        base = linear(self.base_activation(x), self.base_weight)
        basis = b_spline_basis(x, self.grid, self.spline_order)
        return base + linear(basis.flatten(1), self.spline_weight)


@contextmanager
def lowered(network: Network) -> Iterator[Call]:
    """Hold a network in the form that is exported; afterwards it is as it was."""
    forms = {
        module: LoweredKANLinear(network.layers[name]) for name, module in network.replaced.items()
    }
    with swapped(network.call, forms):
        yield network.call.eval()
