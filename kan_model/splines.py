"""B-splines as pure tensor functions: knots, the Cox-de Boor basis, fitting coefficients.

Letters used throughout, after de Boor:

    k   order of the spline as efficient-KAN counts it, which is its polynomial degree (3 = cubic)
    G   grid size: the number of intervals between the ends of the grid
    K   number of knots, G + 2k + 1: the grid's G + 1 points and k more on either side
    n   number of basis functions, G + k

Rules of this module: no state, no I/O, no `nn.Module`. `b_spline_basis` has no branch that
depends on data, so it traces; the functions that fit or place knots are for training time.

Source of the formulas: C. de Boor, A Practical Guide to Splines, revised edition, chapter IX;
the placing of knots follows efficient-KAN, https://github.com/Blealtan/efficient-kan.
"""

import torch
from torch import Tensor

MAX_ORDER = 5
"""Highest spline order offered. Above it the recursion in float32 has not been measured."""


def uniform_knots(
    in_features: int, grid_size: int, order: int, grid_range: tuple[float, float]
) -> Tensor:
    """Place equally spaced knots, the same for every feature.

    The arithmetic is efficient-KAN's own, so that the float32 values agree to the last bit.

    Args:
        in_features: Number of features.
        grid_size: G, the number of intervals on `grid_range`.
        order: k, the spline order.
        grid_range: Ends (low, high) of the grid; k knots more lie outside on each side.

    Returns:
        Knots, shape (in_features, G + 2k + 1), in torch's default dtype.
    """
    if torch.get_default_device().type == "meta":  # arithmetic there imports torch's compiler: 2 s
        return torch.empty(in_features, grid_size + 2 * order + 1)
    low, high = grid_range
    step = (high - low) / grid_size
    knots = torch.arange(-order, grid_size + order + 1) * step + low  # (K,)
    return knots.expand(in_features, -1).contiguous()  # (in, K)


def b_spline_basis(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """Evaluate every B-spline basis function at every input, by the Cox-de Boor recursion.

        B[i, 0](x) = 1 if t[i] <= x < t[i+1] else 0
        B[i, p](x) = (x - t[i]) / (t[i+p] - t[i]) * B[i, p-1](x)
                   + (t[i+p+1] - x) / (t[i+p+1] - t[i+1]) * B[i+1, p-1](x)

    The intervals are half open. Between t[k] and t[n] the functions sum to one; from there to the
    outermost knots they fade; beyond those they are all zero. For k >= 1 a NaN or an infinity
    makes the whole row NaN.

    Args:
        x: Inputs, shape (..., in).
        knots: Strictly rising along the last axis, shape (in, G + 2k + 1).
        order: k, the spline order.

    Returns:
        Basis values, shape (..., in, G + k).
    """
    x = x.unsqueeze(-1)  # (..., in, 1)
    basis = ((x >= knots[:, :-1]) & (x < knots[:, 1:])).to(x.dtype)  # (..., in, K - 1)
    for p in range(1, order + 1):
        t_i = knots[:, : -(p + 1)]
        t_i1 = knots[:, 1:-p]
        t_ip = knots[:, p:-1]
        t_ip1 = knots[:, p + 1 :]
        rising = (x - t_i) / (t_ip - t_i) * basis[..., :-1]
        falling = (t_ip1 - x) / (t_ip1 - t_i1) * basis[..., 1:]
        basis = rising + falling  # (..., in, K - 1 - p)
    return basis


def b_spline_slope(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """Evaluate the derivative of every B-spline basis function at every input.

        B[i, k]'(x) = k / (t[i+k] - t[i]) * B[i, k-1](x)
                    - k / (t[i+k+1] - t[i+1]) * B[i+1, k-1](x)

    At a knot where it jumps it is the slope to the right. de Boor, chapter X, equation (8).

    Args:
        x: Inputs, shape (..., in).
        knots: Strictly rising along the last axis, shape (in, G + 2k + 1).
        order: k, the spline order; a staircase, k = 0, has no slope.

    Returns:
        Slopes, shape (..., in, G + k), per unit of x.
    """
    if order == 0:
        return torch.zeros_like(b_spline_basis(x, knots, 0))
    lower = b_spline_basis(x, knots, order - 1)  # (..., in, G + k + 1)
    per_width = order * lower / (knots[:, order:] - knots[:, :-order])
    return per_width[..., :-1] - per_width[..., 1:]


def fit_coefficients(x: Tensor, y: Tensor, knots: Tensor, order: int) -> Tensor:
    """Fit spline coefficients to points on curves, in the least-squares sense.

    Where the points do not determine a coefficient, the solution of smallest norm is taken.

    Args:
        x: Points, shape (points, in).
        y: Values of `curves` curves per feature at those points, shape (points, in, curves).
        knots: Shape (in, G + 2k + 1).
        order: k, the spline order.

    Returns:
        Coefficients, shape (curves, in, G + k).
    """
    basis = b_spline_basis(x, knots, order).transpose(0, 1)  # (in, points, n)
    solution = _least_squares(basis, y.transpose(0, 1))  # (in, n, curves)
    return solution.permute(2, 0, 1).contiguous()


def change_of_knots(x: Tensor, old_knots: Tensor, new_knots: Tensor, order: int) -> Tensor:
    """Find the linear map that carries coefficients from one set of knots to another.

    For each feature, with A_old and A_new the basis at the sample points, the map M minimises
    |A_new M - A_old|; then A_new (M c) is the least-squares fit of A_old c for every coefficient
    vector c at once. So a layer is refitted without its (points, in, out) curves, and any factor
    that multiplies a whole edge, such as the standalone scaler, simply stays where it is.

    Args:
        x: Sample points, shape (points, in).
        old_knots: Shape (in, G + 2k + 1).
        new_knots: Shape (in, G + 2k + 1).
        order: k, the spline order.

    Returns:
        The map per feature in float64, shape (in, G + k, G + k), new coefficient by old.
    """
    x, old_knots, new_knots = x.double(), old_knots.double(), new_knots.double()
    a_old = b_spline_basis(x, old_knots, order).transpose(0, 1)  # (in, points, n)
    a_new = b_spline_basis(x, new_knots, order).transpose(0, 1)  # (in, points, n)
    return _least_squares(a_new, a_old)


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    """Solve min |a s - b| for batches; rank-deficient `a` gives the solution of smallest norm.

    Features that are constant, binary or sparse leave basis functions without samples, so lost
    rank is the normal case. That rules out torch's CUDA driver, which assumes full rank, and
    its CPU default gelsy, which in 2.13 misjudges the rank of some of them; gelsd, by singular
    values, does not. Solved in float64, on the CPU.
    """
    solution: Tensor = torch.linalg.lstsq(
        a.double().cpu(), b.double().cpu(), driver="gelsd"
    ).solution
    return solution.to(b)


def adapted_knots(
    samples: Tensor, grid_size: int, order: int, grid_eps: float, margin: float
) -> Tensor:
    """Place knots where the samples are, as efficient-KAN's `update_grid` does.

    The grid is `grid_eps` parts a uniform grid over the samples' range, widened by `margin` on
    each side, and `1 - grid_eps` parts the samples' quantiles. The k knots on either side are a
    uniform step apart.

    Args:
        samples: Finite values, shape (points, in), at least one point.
        grid_size: G.
        order: k, the spline order.
        grid_eps: Share of the uniform grid, in [0, 1].
        margin: Widening of the samples' range on each side, in units of x, at least 0.

    Returns:
        Strictly rising knots, shape (in, G + 2k + 1), in the dtype of `samples`.

    Raises:
        ValueError: There are no samples, one is not finite, `margin` is negative, or the knots of
            a feature would collapse onto each other in this dtype.
    """
    if not margin >= 0:
        raise ValueError(f"update_grid needs a margin of at least 0, found {margin}")
    if samples.shape[0] == 0:
        raise ValueError("update_grid needs at least one sample, found none")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("update_grid needs finite samples, found NaN or infinity among them")
    ordered = torch.sort(samples, dim=0).values  # (points, in)
    quantile = torch.linspace(
        0, samples.shape[0] - 1, grid_size + 1, dtype=torch.int64, device=samples.device
    )
    adaptive = ordered[quantile]  # (G + 1, in)

    def arange(start: int, stop: int, step: int = 1) -> Tensor:
        return torch.arange(
            start, stop, step, dtype=samples.dtype, device=samples.device
        ).unsqueeze(1)

    step = (ordered[-1] - ordered[0] + 2 * margin) / grid_size  # (in,)
    uniform = arange(0, grid_size + 1) * step + ordered[0] - margin  # (G + 1, in)
    grid = grid_eps * uniform + (1 - grid_eps) * adaptive
    left = grid[:1] - step * arange(order, 0, -1)  # (k, in)
    right = grid[-1:] + step * arange(1, order + 1)  # (k, in)
    knots = torch.cat([left, grid, right]).T.contiguous()  # (in, K)

    rising = (knots.diff(dim=1) > 0).all(dim=1)  # (in,)
    if not bool(rising.all()):
        feature = int(torch.nonzero(~rising)[0])
        raise ValueError(
            f"update_grid: the knots of feature {feature} collapse in {samples.dtype}: its samples "
            f"span {float(ordered[0, feature]):g} to {float(ordered[-1, feature]):g}, too little "
            "for their magnitude; normalise the inputs, raise margin, or drop that feature"
        )
    return knots


def is_uniform(knots: Tensor) -> Tensor:
    """Tell, for each feature, whether its knots are equally spaced.

    Uniform knots are computed as `j * step + low`, each rounded to the dtype, so a knot may miss
    the ideal line through the outermost two by a few units in the last place of the largest knot.

    Args:
        knots: Shape (in, K).

    Returns:
        Booleans, shape (in,).
    """
    exact = knots.double()
    first, last = exact[:, :1], exact[:, -1:]
    share = torch.linspace(0, 1, knots.shape[1], dtype=torch.float64, device=knots.device)
    line = first + (last - first) * share  # (in, K)
    unit = torch.finfo(knots.dtype).eps * exact.abs().amax(dim=1)  # (in,)
    return (exact - line).abs().amax(dim=1) <= 4 * unit
