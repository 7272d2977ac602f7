"""The function that a file with fewer bits computes, written in plain formulas.

A network with rounded weights is another function than the checkpoint's. It is simulated with the
recursion of `kan_model.splines`, so that it runs in float64 and shares no form of the basis with
the file; the file is then compared with it as tightly as an exact file is with the checkpoint.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from export.conversion.lowering import LoweredKANLinear
from export.conversion.precision import LEVELS, HalfProduct, Int8Product
from export.errors import ParityError
from export.network import Network
from export.parts import swapped
from kan_model import KANLinear
from kan_model.splines import b_spline_basis

_SLACK = 1e-3  # of what rounding to the nearest may be off by, for weights that lie in the middle


class QuantizedKANLinear(nn.Module):
    """A KANLinear of which the basis is rounded to steps, as in int8.

    Args:
        layer: With the weights as they are rounded, and without a scaler.
        step: Between two values of the basis.
    """

    def __init__(self, layer: KANLinear, step: float) -> None:
        super().__init__()
        self.layer = layer
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; shape (..., in) to (..., out)."""
        layer = self.layer
        basis = b_spline_basis(x, layer.grid, layer.spline_order)
        basis = (basis / self.step).round() * self.step
        base = linear(layer.base_activation(x), layer.base_weight)
        return base + linear(basis.flatten(-2), layer.spline_weight.flatten(1))


@torch.no_grad()
def simulate(network: Network, lowered: Mapping[nn.Module, LoweredKANLinear]) -> Network:
    """Put simulations in the place of KANLinear layers.

    Args:
        network: It is not changed.
        lowered: What stands for each KANLinear in the file, none in float32, by the module.

    Raises:
        ParityError: A weight is not rounded to the nearest.
    """
    layers = dict(zip(network.replaced.values(), network.layers.items(), strict=True))
    simulated = {
        module: _simulate_layer(*layers[module], own).eval() for module, own in lowered.items()
    }
    with swapped(network.call, simulated):
        call = copy.deepcopy(network.call)
    return replace(network, call=call, exact=call)


def _simulate_layer(name: str, layer: KANLinear, lowered: LoweredKANLinear) -> nn.Module:
    product, scale = lowered.product, lowered.basis.scale
    assert isinstance(product, HalfProduct | Int8Product)
    step = product.step if isinstance(product, Int8Product) else 1.0
    units = {
        "base_weight": product.base_scale,
        "spline_weight": product.spline_scale / (step * scale),
    }
    base = product.base.double().T  # (out, in)
    spline = product.spline.double().unflatten(0, (-1, layer.in_features))  # in the file's order
    spline = torch.empty_like(spline).index_copy_(0, torch.tensor(lowered.order), spline)
    rounded = {"base_weight": base, "spline_weight": spline.permute(2, 1, 0)}
    exact = {"base_weight": layer.base_weight, "spline_weight": layer.scaled_spline_weight}
    for key, tensor in rounded.items():
        unit = units[key].double().reshape(-1, *[1] * (tensor.dim() - 1))
        _require_nearest(f"{name}.{key}", exact[key].double() / unit, tensor, product)
        rounded[key] = tensor * unit
    simulated = copy.copy(layer)
    simulated._modules = dict(layer._modules)
    simulated._parameters = {
        key: nn.Parameter(tensor.float().contiguous(), requires_grad=False)
        for key, tensor in rounded.items()
    }
    simulated.enable_standalone_scale_spline = False
    if isinstance(product, Int8Product):
        return QuantizedKANLinear(simulated, step * scale)
    return simulated


def _require_nearest(
    name: str, exact: Tensor, rounded: Tensor, product: HalfProduct | Int8Product
) -> None:
    """Compare rounded weights with the exact ones, both in units of the scale.

    Raises:
        ParityError: One of them is further off than rounding to the nearest is.
    """
    if isinstance(product, Int8Product):
        exact, allowed = exact.clamp(-LEVELS, LEVELS), torch.tensor(0.5)
    else:
        limits = torch.finfo(product.spline.dtype)
        allowed = (exact.abs() * limits.eps).clamp_min(limits.smallest_normal * limits.eps) / 2
    wrong = (rounded - exact).abs() > allowed * (1 + _SLACK)
    if bool(wrong.any()):
        raise ParityError(
            f"{name}: {int(wrong.sum()):,} of {wrong.numel():,} weights are not rounded to the "
            "nearest, nothing was published; please report it with the checkpoint"
        )
