"""What the mean and the variance of every edge are made of: sums over points, and no weights.

Only k + 1 basis functions are not zero at a point, so what is added up there takes no more time for
a fine grid than for a coarse one, and what is kept is a band. All of it is float64.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kan_model import KANLinear
from kan_model.splines import b_spline_basis

_FEWEST_POINTS = 64  # on a grid, where there are no samples


@dataclass(frozen=True)
class Moments:
    """Over points, what the mean and the variance of every edge from some inputs are made of.

    An edge is a sum of b, of s = the sum of all basis functions, which is 1 on the grid, and of
    basis functions whose weights are told from their mean. So a constant spline has only s, and
    what is subtracted from its second moment is no larger than what is left. Only k + 1 functions
    are not zero at a point, so of their products a band is enough.

    Attributes:
        varies: Whether the input's values differ, shape (in,).
        base: Mean of b, shape (in,).
        few: The covariance of b and s, shape (in, 2, 2).
        cross: That of b and s with each basis function, shape (in, 2, n).
        mean: Of each basis function, shape (in, n).
        band: Mean products of each basis function and the ones after it, shape (k + 1, in, n).
    """

    varies: Tensor
    base: Tensor
    few: Tensor
    cross: Tensor
    mean: Tensor
    band: Tensor

    def deviation(self, base: Tensor, spline: Tensor) -> Tensor:
        """Compute the standard deviation of edges: shapes (out, in), (out, in, n) to (out, in)."""
        there = self.mean.sum(dim=-1)
        level = (spline * self.mean).sum(dim=-1) / torch.where(there > 0, there, 1)  # (out, in)
        rest = spline - level[..., None]
        pair = torch.stack([base, level], dim=-1)  # (out, in, 2)
        square = torch.einsum("oia,iab,oib->oi", pair, self.few, pair)
        square += 2 * (pair * torch.einsum("oic,iac->oia", rest, self.cross)).sum(dim=-1)
        width = rest.shape[-1]
        for apart, products in enumerate(self.band[:width]):
            own = rest[..., : width - apart] * rest[..., apart:] * products[:, : width - apart]
            square += (1 if apart == 0 else 2) * own.sum(dim=-1)
        return torch.where(self.varies, square.clamp_min(0).sqrt(), 0)

    def average(self, base: Tensor, spline: Tensor) -> Tensor:
        """Compute the mean of edges: shapes (out, in), (out, in, n) to (out, in)."""
        return base * self.base + (spline * self.mean).sum(dim=-1)


@torch.no_grad()
def measure_moments(layer: KANLinear, some: slice, samples: Tensor | None, budget: int) -> Moments:
    """Add up over samples, or over points that are evenly spread over each input's grid.

    Args:
        layer: It is not changed.
        some: Which of its inputs.
        samples: Of the layer's input, shape (..., in); what is not finite is passed over.
        budget: Numbers that one tensor may hold: points go piece by piece.
    """
    knots = layer.grid.detach()[some].double().cpu().contiguous()
    at_once = max(1, budget // (len(knots) * (2 * layer.spline_order + 2)))
    if samples is None:
        return _add_up(layer, knots, _over_the_grid(layer, knots, at_once))
    rows = samples.detach().reshape(-1, layer.in_features)[:, some].T
    pieces = (piece.double().cpu().contiguous() for piece in rows.split(at_once, dim=1))
    return _add_up(layer, knots, pieces)


def _over_the_grid(layer: KANLinear, knots: Tensor, at_once: int) -> Iterator[Tensor]:
    """Place points in the middles of equal parts of each input's grid, shape (in, points)."""
    count = max(_FEWEST_POINTS, 4 * layer.grid_size)
    low = knots[:, layer.spline_order, None]
    high = knots[:, layer.spline_order + layer.grid_size, None]
    for points in torch.arange(count).split(at_once):
        yield low + (high - low) * ((points.double() + 0.5) / count)


def _add_up(layer: KANLinear, knots: Tensor, points: Iterable[Tensor]) -> Moments:
    """Sum up over points of each input, shape (in, points) a piece; only finite ones count."""
    k, inputs, intervals = layer.spline_order, len(knots), knots.shape[1] - 1
    functions = intervals - k
    # The functions on an interval need k knots on either side, so there are some beyond the ends;
    # what would come from those alone is left out.
    beyond = (knots[:, 1:2] - knots[:, :1]) * torch.arange(1, k + 1)
    padded = torch.cat([knots[:, :1] - beyond.flip(1), knots, knots[:, -1:] + beyond], dim=1)
    windows = padded.unfold(1, 2 * k + 2, 1)  # (in, intervals, 2k + 2)
    row = torch.arange(inputs)[:, None]
    zeros = partial(torch.zeros, dtype=torch.float64)
    count, sums, products = zeros(inputs), zeros(2, inputs), zeros(2, 2, inputs)
    mean, cross = zeros(inputs, functions), zeros(2, inputs, functions)
    band = zeros(k + 1, inputs, functions)
    low = torch.full((inputs,), torch.inf, dtype=torch.float64)
    high = -low
    origin: Tensor | None = None
    for given in points:
        if not given.shape[1]:  # a part of the network that no row reaches
            continue
        finite = torch.isfinite(given)
        low = torch.minimum(low, torch.where(finite, given, torch.inf).amin(dim=1))
        high = torch.maximum(high, torch.where(finite, given, -torch.inf).amax(dim=1))
        x = torch.where(finite, given, knots[:, :1])
        place = (torch.searchsorted(knots, x, right=True) - 1).clamp(0, intervals - 1)
        basis = b_spline_basis(x.flatten(), windows[row, place].flatten(0, 1), k)
        index = place[..., None] + torch.arange(-k, 1)  # (in, points, k + 1)
        inside = finite & (x >= knots[:, :1]) & (x < knots[:, -1:])
        own = (index >= 0) & (index < functions) & inside[..., None]
        basis = torch.where(own, basis.reshape(index.shape), 0)
        index = index.clamp(0, functions - 1)
        pair = torch.stack([activate(layer, x.T).T, basis.sum(dim=-1)])  # (2, in, points)
        if origin is None:  # from which less is lost in the squares
            origin = pair[..., :1]
        pair = torch.where(finite, pair - origin, 0)
        count += finite.sum(dim=1)
        sums += pair.sum(dim=-1)
        products += torch.einsum("aip,bip->abi", pair, pair)
        for j in range(k + 1):
            at, value = index[..., j], basis[..., j]
            mean.scatter_add_(1, at, value)
            for one, function in zip(cross, pair, strict=True):
                one.scatter_add_(1, at, value * function)
            for apart in range(k + 1 - j):
                band[apart].scatter_add_(1, at, value * basis[..., j + apart])
    count = count.clamp_min(1)
    sums, mean = sums / count, mean / count[:, None]
    return Moments(
        varies=low < high,
        base=sums[0] if origin is None else sums[0] + origin[0, :, 0],
        few=(products / count - sums[:, None] * sums[None]).permute(2, 0, 1),
        cross=(cross / count[:, None] - sums[..., None] * mean).transpose(0, 1),
        mean=mean,
        band=band / count[:, None],
    )


def activate(layer: KANLinear, x: Tensor) -> Tensor:
    """Apply the base activation in float64, or in float32 if it insists on it."""
    x = x.contiguous()  # as what reaches it in the network is; some want to view it
    y: Tensor
    try:
        y = copy.deepcopy(layer.base_activation).double()(x)
    except RuntimeError:
        y = layer.base_activation(x.to(layer.base_weight.dtype).to(layer.grid.device))
    return y.double()
