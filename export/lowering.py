"""A network to the form that is exported: one that keeps its precision in every runtime.

The untouched network stays the reference; nothing here is trusted without the comparison in
parity.py.
"""

import copy

import torch
from torch import Tensor, nn

from kan_model import KAN


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


def lower(network: KAN) -> KAN:
    """Copy a network into the form that is exported: float32, activations in precise forms.

    Args:
        network: As loaded. It is not changed.

    Returns:
        A copy in evaluation mode that shares no memory with `network`.
    """
    lowered = copy.deepcopy(network).float().eval()
    for layer in lowered.layers:
        if type(layer.base_activation) is nn.SiLU:
            layer.base_activation = ExpSiLU()
    return lowered
