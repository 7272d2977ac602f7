"""KANLinear: the layer of efficient-KAN, in its basis-then-linear form.

The layer computes, for every edge from input i to output o,

    phi[o, i](x) = base_weight[o, i] * act(x)
                 + scaler[o, i] * sum over c of spline_weight[o, i, c] * B[i, c](x)

and sums over i. The basis B is shared by all outputs, so it is computed once and the sum is a
matrix product; no (batch, out, in) tensor ever exists.

Names of parameters and buffers, defaults, initialisation and forward semantics are those of
https://github.com/Blealtan/efficient-kan, so its state dicts load unchanged. Where this layer
differs, the docstring says so. This module holds no mathematics of splines and no I/O.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kan_model import splines


class KANLinear(nn.Module):
    """A Kolmogorov-Arnold layer with B-spline edges and a base path.

    State dict: `base_weight` (out, in), `spline_weight` (out, in, G + k), `grid`
    (in, G + 2k + 1) and, with the standalone scaler, `spline_scaler` (out, in).

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        grid_size: G, the number of grid intervals, at least 1.
        spline_order: k, the spline order (polynomial degree), 0 to 5. Upstream fails at 0.
        scale_noise: Amplitude of the curves the splines start from.
        scale_base: Enters the initialisation of `base_weight` as upstream does it: kaiming uniform
            with a negative slope of sqrt(5) * scale_base.
        scale_spline: The same for `spline_scaler`; without the scaler, a factor on the initial
            spline weights.
        enable_standalone_scale_spline: Whether each edge has its own learned scale.
        base_activation: Makes the activation of the base path, called without arguments.
        grid_eps: Share of the uniform grid in `update_grid`, in [0, 1]; the rest follows the
            data's quantiles.
        grid_range: Ends (low, high) of the initial grid, far enough apart for float32.

    Raises:
        ValueError: An argument is out of its range.
    """

    grid: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        scale_noise: float = 0.1,
        scale_base: float = 1.0,
        scale_spline: float = 1.0,
        enable_standalone_scale_spline: bool = True,
        base_activation: Callable[[], nn.Module] = nn.SiLU,
        grid_eps: float = 0.02,
        grid_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        low, high = _checked_range(grid_range)
        _require_at_least_one(
            in_features=in_features, out_features=out_features, grid_size=grid_size
        )
        if not 0 <= grid_eps <= 1:
            raise ValueError(f"grid_eps must be in [0, 1], found {grid_eps}")
        if not 0 <= spline_order <= splines.MAX_ORDER:
            raise ValueError(f"spline_order must be 0 to {splines.MAX_ORDER}, found {spline_order}")
        self.in_features = in_features
        self.out_features = out_features
        self.grid_size = grid_size
        self.spline_order = spline_order
        self.scale_noise = scale_noise
        self.scale_base = scale_base
        self.scale_spline = scale_spline
        self.enable_standalone_scale_spline = enable_standalone_scale_spline
        self.grid_eps = grid_eps
        self.base_activation = base_activation()

        knots = splines.uniform_knots(in_features, grid_size, spline_order, (low, high))
        if not knots.is_meta and not bool((knots[0].diff() > 0).all()):
            raise ValueError(
                f"grid_range {list(grid_range)} is too narrow for {grid_size} intervals in "
                f"{knots.dtype}: knots coincide"
            )
        self.register_buffer("grid", knots)
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.spline_weight = nn.Parameter(
            torch.empty(out_features, in_features, grid_size + spline_order)
        )
        if enable_standalone_scale_spline:
            self.spline_scaler = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: kaiming-uniform base weights and scalers, splines fitted to small noise.

        The order of random draws is upstream's, so a seed gives the same layer, up to rounding. On
        the meta device there are no values to set, and nothing is done.
        """
        if self.base_weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5) * self.scale_base)
        with torch.no_grad():
            shape = (self.grid_size + 1, self.in_features, self.out_features)
            noise = (torch.rand(shape) - 0.5) * self.scale_noise / self.grid_size
            k = self.spline_order
            points = self.grid.T[k : k + self.grid_size + 1]  # (G + 1, in)
            fitted = splines.fit_coefficients(points, noise.to(points), self.grid, k)
            scale = 1.0 if self.enable_standalone_scale_spline else self.scale_spline
            self.spline_weight.copy_(scale * fitted)
        if self.enable_standalone_scale_spline:
            nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5) * self.scale_spline)

    @property
    def scaled_spline_weight(self) -> Tensor:
        """Spline coefficients with the standalone scaler applied, shape (out, in, G + k)."""
        if self.enable_standalone_scale_spline:
            return self.spline_weight * self.spline_scaler.unsqueeze(-1)
        return self.spline_weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Outside the outermost knots the spline is zero and only the base path remains. For k >= 1
        NaN and infinities give NaN.

        Args:
            x: Inputs, shape (..., in).

        Returns:
            Outputs, shape (..., out). Unlike upstream, an empty batch is accepted.

        Raises:
            ValueError: The last dimension of `x` is not `in_features`.
        """
        # While TorchScript traces, shapes are tensors and the question itself would be recorded.
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._check_width(x)
        base = linear(self.base_activation(x), self.base_weight)
        basis = splines.b_spline_basis(x, self.grid, self.spline_order)  # (..., in, n)
        spline = linear(basis.flatten(-2), self.scaled_spline_weight.flatten(1))
        return base + spline

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Move the knots to where the samples lie and refit the splines to the same function.

        Upstream fits the new coefficients to curves that already hold the standalone scaler and
        then keeps the scaler, so with its defaults the scale is applied twice and the function
        changes. Here the refit is a linear map on the unscaled coefficients, so the function is
        kept, as closely as splines on the new knots can, with the scaler on or off. The solve is in
        float64. Nothing is changed when an error is raised.

        Args:
            x: Samples of the layer's input, shape (..., in).
            margin: Widening of the samples' range on each side, in units of x.

        Raises:
            ValueError: The width is wrong, there are no samples, one is not finite, or the knots
                of a feature would collapse.
        """
        self._check_width(x)
        samples = x.reshape(-1, self.in_features).to(self.grid)
        knots = splines.adapted_knots(
            samples, self.grid_size, self.spline_order, self.grid_eps, margin
        )
        refit = splines.change_of_knots(samples, self.grid, knots, self.spline_order)
        weight = torch.einsum("inc,oic->oin", refit, self.spline_weight.double())
        self.spline_weight.copy_(weight)
        self.grid.copy_(knots)

    def regularization_loss(
        self, regularize_activation: float = 1.0, regularize_entropy: float = 1.0
    ) -> Tensor:
        """Penalise large edges and many edges, from the weights alone.

        The L1 norm of an edge is taken as the mean absolute value of its spline weights, as
        efficient-KAN does in place of the sample-based norm of the KAN paper
        (https://arxiv.org/abs/2404.19756, section 2.5); the entropy is that of the norms as shares
        of their sum. Unlike upstream, an edge of zeros, or all of them, gives no NaN.

        Args:
            regularize_activation: Factor of the L1 term.
            regularize_entropy: Factor of the entropy term, in nats.

        Returns:
            The loss, a scalar.
        """
        norms = self.spline_weight.abs().mean(-1)  # (out, in)
        total = norms.sum()
        limits = torch.finfo(norms.dtype)
        share = norms / total.clamp_min(limits.tiny**0.5)  # tiny would overflow in the gradient
        entropy = -(share * share.clamp_min(limits.tiny).log()).sum()
        return regularize_activation * total + regularize_entropy * entropy

    def extra_repr(self) -> str:
        """Say the layer's shape when it is printed."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"grid_size={self.grid_size}, spline_order={self.spline_order}, "
            f"enable_standalone_scale_spline={self.enable_standalone_scale_spline}"
        )

    def _check_width(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"KANLinear expects inputs of shape (..., {self.in_features}), "
                f"found {tuple(x.shape)}"
            )


def _checked_range(grid_range: Sequence[float]) -> tuple[float, float]:
    if len(grid_range) != 2:
        raise ValueError(f"grid_range must be (low, high), found {list(grid_range)}")
    low, high = float(grid_range[0]), float(grid_range[1])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"grid_range must be finite with low < high, found {list(grid_range)}")
    return low, high


def _require_at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, found {size}")
