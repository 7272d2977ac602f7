"""B-spline bases as they are exported: fast with standard operators, and as exact as the recursion.

The functions are laid out coefficient by coefficient, each a row of all features, so that every
operation runs over long contiguous rows. There are two ways to compute them:

    cardinal    equally spaced knots: each function is the same bump, written in closed form
    recursion   any rising knots: Cox-de Boor, from the hats of order 1 upwards

The knots are the only tensor of either, because the fused operator (functions.py) wants them as
they are. What follows from them alone, onnxruntime computes when it loads the model, TorchScript
when it is frozen.

Functions are parted into interleaved groups: of `groups` groups, group j holds the functions
j, j + groups, and so on.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from export.conversion.symbolic import ramp
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
        self.groups = _groups(count, features, "cardinal")
        self.functions = _interleaved(count, self.groups)
        self.knots = _constant(knots.T.float())  # (G + 2k + 1, in)
        self.has_common_step = bool(((steps - steps[0]).abs() <= 2.0**-23 * steps[0]).all())
        self.order = order
        half = (order + 1) / 2
        self.scale = half**order / math.factorial(order)
        # Each term with its binomial inside the power, in units in which the first is 1 at c.
        step = float(steps[0]) if self.has_common_step else 1.0
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
        knots, k = self.knots, self.order
        basis = []
        for functions in self.functions:
            # The centre of function i lies in the middle of knots i to i + k + 1.
            first, end = functions[0], functions[-1] + 1
            centres = knots[first + (k + 1) // 2 : end + (k + 1) // 2 : self.groups]
            if k % 2 == 0:
                centres = (centres + knots[first + k // 2 + 1 : end + k // 2 + 1 : self.groups]) / 2
            distance = (x - centres).abs()
            if not self.has_common_step:
                distance = distance / ((knots[-1] - knots[0]) / (len(knots) - 1))
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
    it belongs to. In interleaved groups a neighbour is always in the next group at the same place,
    and nothing has to be moved.

    Differences of knots are exact enough in float32: each is rounded once, as it would be from
    float64.

    Args:
        knots: Shape (in, G + 2k + 1).
        order: k.
    """

    scale = 1.0
    peak = 1.0

    def __init__(self, knots: Tensor, order: int) -> None:
        super().__init__()
        features, count = knots[:, order + 1 :].shape
        self.groups = _groups(count, features, "recursion")
        self.length = math.ceil(count / self.groups)
        missing = self.groups * self.length + order + 1 - knots.shape[1]  # to complete a group
        beyond = (knots[:, -1:] - knots[:, -2:-1]) * torch.arange(1, missing + 1)
        self.functions = _interleaved(count, self.groups)
        self.knots = _constant(torch.cat([knots, knots[:, -1:] + beyond], dim=1).T.float())
        self.order = order

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """Evaluate the basis; arguments and result are those of `CardinalBasis`."""
        x = x.unsqueeze(1)
        knots = [
            self.knots[start : start + self.groups * self.length : self.groups]
            for start in range(self.groups + self.order + 1)
        ]
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


def _interleaved(functions: int, groups: int) -> list[list[int]]:
    """Part functions into groups, each with every so-manieth of them."""
    return [list(range(start, functions, groups)) for start in range(groups)]


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
