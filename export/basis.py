"""B-spline bases as they are exported: fast with standard operators, and as exact as the recursion.

The functions are laid out coefficient by coefficient, each a row of all features, so that every
operation runs over long contiguous rows. There are two ways to compute them:

    cardinal    equally spaced knots: each function is the same bump, written in closed form
    recursion   any rising knots: Cox-de Boor, from the hats of order 1 upwards
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from export.symbolic import ramp
from kan_bundle.manifest import Form

_NUMBERS_A_ROW: Mapping[Form, int] = {"cardinal": 2048, "recursion": 1024}
"""How many numbers of one row a tensor of the basis should hold.

Basis functions are grouped up to this size. Larger tensors leave the cache: on 784 features and 256
rows (two AVX-512 cores with 2 MiB of L2 each, onnxruntime 1.32.0) the recursion takes 2.7 times as
long all at once as one function at a time, the closed form 1.2 times as long as two at a time.
Smaller ones are more operations, each with a cost of its own, which shows on one row. The closed
form has fewer operations and so profits from larger groups.
"""


class CardinalBasis(nn.Module):
    """B-splines on equally spaced knots, as functions of the distance to their centres.

    With h the step, c the centre, v = |x - c| / h and m = (k + 1) / 2,

        B(x) = 1/k! * sum over i of (-1)^i * binomial(k + 1, i) * max(0, m - i - v)^k,

    where only the terms with i < m count. I. Schoenberg's cardinal B-spline by symmetry from one
    side; de Boor, chapter X. Unlike the truncated powers of all k + 1 terms it cancels little.

    Args:
        knots: Equally spaced for each feature, shape (in, G + 2k + 1).
        order: k, at least 1.
    """

    def __init__(self, knots: Tensor, order: int) -> None:
        super().__init__()
        features, count = knots[:, order + 1 :].shape
        exact = knots.double()
        steps = (exact[:, -1] - exact[:, 0]) / (knots.shape[1] - 1)  # (in,)
        first, second = (order + 1) // 2, order // 2 + 1  # around the centre; the same if k is odd
        centres = (exact[:, first : first + count] + exact[:, second : second + count]) / 2
        groups = _groups(count, features, "cardinal")
        self.functions = [list(range(start, count, groups)) for start in range(groups)]
        self.centres = nn.ParameterList(
            _constant(centres[:, group].T.float()) for group in self.functions
        )
        common = bool(((steps - steps[0]).abs() <= 2.0**-23 * steps[0]).all())
        self.steps = None if common else nn.Parameter(steps.float(), requires_grad=False)
        self.order = order
        half = (order + 1) / 2
        self.scale = half**order / math.factorial(order)
        # Each term with its binomial inside the power, in units in which the first is 1 at c.
        step = float(steps[0]) if common else 1.0
        inner = [math.comb(order + 1, i) ** (1 / order) / half for i in range(math.ceil(half))]
        self.ramps = [(root * (half - i), root / step) for i, root in enumerate(inner)]
        self.peak = sum((-1) ** i * top**order for i, (top, _) in enumerate(self.ramps))

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """Evaluate the basis, up to the factor `scale`; an x that is no number gives any number.

        Args:
            x: Shape (rows, in).
            base: What is to stand behind the basis, shape (rows, in).

        Returns:
            Shape (rows, in * (G + k)): the functions in the order of `functions`; with `base`
            behind them in * (G + k + 1).
        """
        x = x.unsqueeze(1)
        basis = []
        for centres in self.centres:
            distance = (x - centres).abs()
            if self.steps is not None:
                distance = distance / self.steps
            terms = [_power(ramp(distance, *line), self.order) for line in self.ramps]
            value = terms[0]
            for i, term in enumerate(terms[1:]):
                value = value + term if i % 2 else value - term
            basis.append(value)
        return _side_by_side(basis, base)


class RecursiveBasis(nn.Module):
    """B-splines on any rising knots, by the Cox-de Boor recursion from the hats upwards.

        w[i, p] = (x - t[i]) / (t[i+p] - t[i])
        B[i, 1] = u[i] - u[i+1]                           with u[i] = w[i, 1] clamped to [0, 1]
        B[i, p] = w[i, p] * B[i, p-1] - w[i+1, p] * B[i+1, p-1] + B[i+1, p-1]

    which is the formula of `kan_model.splines.b_spline_basis`, each weight used for both functions
    it belongs to. Functions are grouped so that a neighbour is always in the next group at the same
    place, and nothing has to be moved: group j holds the functions j, j + groups, and so on.

    The knots are the only constants. Their differences are exact enough in float32 (each is
    rounded once, as it would be from float64), and onnxruntime computes them when it loads the
    model, TorchScript when it is frozen.

    Args:
        knots: Shape (in, G + 2k + 1).
        order: k.
    """

    scale = 1.0
    peak = 1.0

    def __init__(self, knots: Tensor, order: int) -> None:
        super().__init__()
        features, count = knots[:, order + 1 :].shape
        groups = _groups(count, features, "recursion")
        length = math.ceil(count / groups)
        beyond = groups * length + order + 1 - knots.shape[1]  # knots that complete the last group
        last_step = (knots[:, -1:] - knots[:, -2:-1]) * torch.arange(1, beyond + 1)
        rows = torch.cat([knots, knots[:, -1:] + last_step], dim=1).T
        self.functions = [list(range(start, count, groups)) for start in range(groups)]
        self.knots = nn.ParameterList(
            _constant(rows[start::groups][:length].float()) for start in range(groups + order + 1)
        )
        self.order = order

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """Evaluate the basis; arguments and result are those of `CardinalBasis`."""
        x = x.unsqueeze(1)
        knots: list[Tensor] = list(self.knots)
        if self.order == 0:
            steps = [(x >= t).to(x.dtype) for t in knots]
            basis = [left - right for left, right in pairwise(steps)]
        else:
            offsets = [x - t for t in knots[:-1]]

            def weight(i: int, p: int) -> Tensor:
                return offsets[i] / (knots[i + p] - knots[i])

            ramps = [weight(i, 1).clamp(0, 1) for i in range(len(offsets))]
            basis = [left - right for left, right in pairwise(ramps)]
            for p in range(2, self.order + 1):
                rising = [weight(i, p) * b for i, b in enumerate(basis)]
                basis = [
                    left - right + b
                    for (left, right), b in zip(pairwise(rising), basis[1:], strict=True)
                ]
        groups = zip(basis, self.functions, strict=True)
        return _side_by_side([b[:, : len(functions)] for b, functions in groups], base)


def _groups(functions: int, features: int, form: Form) -> int:
    """Count the groups that hold at most so many numbers a row, or one function."""
    length = min(functions, max(1, _NUMBERS_A_ROW[form] // features))
    return math.ceil(functions / length)


def _side_by_side(basis: Sequence[Tensor], base: Tensor | None) -> Tensor:
    behind = [] if base is None else [base.unsqueeze(1)]
    return torch.cat([*basis, *behind], dim=1).flatten(1)


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=False)


def _power(value: Tensor, order: int) -> Tensor:
    """Multiply: onnxruntime's Pow runs on one thread only."""
    if order == 1:
        return value
    square = value * value
    if order <= 3:
        return square if order == 2 else square * value
    return square * square if order == 4 else square * square * value
