"""KANLinear layers to the form that is exported: fast with standard operators, and as exact.

A layer becomes one matrix product,

    y = [B_0(x) | B_1(x) | ... | act(x)] @ weight,

with the scaler and the constant factors of the basis folded into the weight in float64. The basis
functions are laid out coefficient by coefficient, each a row of all features, so that every
operation runs over long contiguous rows. The base path comes last, because its few terms tend to be
the largest: in front of the others every later addition is rounded to their size, and [16, 32, 8]
is three times as far from float64 as it need be. The basis is computed in one of two ways:

    cardinal    equally spaced knots: each function is the same bump, written in closed form
    recursion   any rising knots: Cox-de Boor, from the hats of order 1 upwards

Which one a layer gets is measured (`choose_form`). The untouched network stays the reference;
nothing here is trusted without the comparison in parity.py.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from export.network import Call, Network, inputs_of_layers, swapped
from export.precision import Float32Product, HalfProduct, Int8Product, Precision
from export.probes import make_kan_probes
from export.symbolic import ramp
from kan_model import KANLinear
from kan_model.splines import is_uniform

Form = Literal["cardinal", "recursion"]

CARDINAL_FACTOR = 1.5
"""The closed form is taken if its error is at most this many times the error of eager's float32.

A file may have twice eager's error (reference.py); this leaves room for the layers after it.
"""

_ROWS_PER_GROUP = 64
_OUTPUTS = 64  # of a layer, which are enough to tell
_NUMBERS_AT_ONCE = 2**22  # of a basis in float64
_WITHIN_KNOTS = ("knots", "inside", "margin")

_NUMBERS_A_ROW: Mapping[Form, int] = {"cardinal": 2048, "recursion": 1024}
"""How many numbers of one row a tensor of the basis should hold.

Basis functions are grouped up to this size. Larger tensors leave the cache: on 784 features and 256
rows the recursion takes 3.9 ms one function at a time and 10.7 ms all at once, the closed form 3.6
ms two at a time and 4.3 ms all at once. Smaller ones are more operations, each with a cost of its
own, which shows on one row. The closed form has fewer operations and so profits from larger groups.
"""


@dataclass(frozen=True)
class Choice:
    """The form of one layer, and what was measured for it.

    Attributes:
        form: How the basis is computed.
        error: Largest |y - y64| of the layer in this form, in float32 and without its activation,
            within its knots, at up to 64 of its outputs.
        eager_error: The same of the layer as it is.
    """

    form: Form
    error: float
    eager_error: float


class ExpSiLU(nn.Module):
    """SiLU as x / (1 + exp(-x)), which keeps its relative precision for negative x.

    onnxruntime's Sigmoid on CPU is a rational approximation with a constant absolute error: in
    1.32.0 x * Sigmoid(x) is off by 2e-3 of its value at x = -10 and by all of it beyond -20, where
    this form keeps 1.4e-7 and 1.7e-7, as torch does. Large weights make the difference visible.
    It costs 0.1 ms on 256 x 784 values, of 3 ms for such a layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to each element; shape (...) to (...)."""
        return x / (1 + torch.exp(-x))


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

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """Evaluate the basis, up to the factor `scale`; an x that is no number gives any number.

        Args:
            x: Shape (rows, in).
            base: What stands behind the basis, shape (rows, in).

        Returns:
            Shape (rows, in * (G + k + 1)): the functions in the order of `functions`, and `base`.
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
    rounded once, as it would be from float64), and runtimes compute them when they load the model.

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

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
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


class LoweredKANLinear(nn.Module):
    """A KANLinear for inference: activation and basis side by side, then the product.

    Args:
        layer: In float32.
        form: How to compute the basis; `cardinal` from order 1 on.
        precision: Of the product.
        samples: Inputs of the layer, shape (rows, in), to choose the scales of int8 on; None takes
            points within the knots.
    """

    def __init__(
        self,
        layer: KANLinear,
        form: Form,
        precision: Precision = "fp32",
        samples: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features = layer.in_features
        silu = type(layer.base_activation) is nn.SiLU
        self.activation = ExpSiLU() if silu else layer.base_activation
        knots, k = layer.grid, layer.spline_order
        self.basis = CardinalBasis(knots, k) if form == "cardinal" else RecursiveBasis(knots, k)
        # NaN and infinities must show in the answer; clamping and whole numbers lose them.
        self.loses_nan = k == 1 or (k > 1 and (form == "cardinal" or precision == "int8"))
        weight = _fold(layer, self.basis)
        self.product: nn.Module
        if precision == "fp32":
            self.product = Float32Product(weight)
        elif precision == "int8":
            points = probes_within(layer) if samples is None else samples
            basis = self.basis(points, points)[:, : -layer.in_features]
            self.product = Int8Product(weight, layer.in_features, self.basis.peak, basis)
        else:
            dtype = torch.float16 if precision == "fp16" else torch.bfloat16
            self.product = HalfProduct(weight, layer.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; shape (..., in) to (..., out)."""
        y: Tensor = self.product(self._columns(x))
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])

    def _columns(self, x: Tensor) -> Tensor:
        base = self.activation(x)  # which may know its channels by their dimension
        if self.loses_nan:
            base = base + 0 * x
        if x.dim() != 2:
            x, base = (value.reshape(-1, self.in_features) for value in (x, base))
        columns: Tensor = self.basis(x, base)
        return columns


@torch.no_grad()
def choose_form(layer: KANLinear) -> Choice:
    """Take the closed form where it is exact enough, else the recursion.

    The closed form takes the knots for equally spaced. In float32 they only nearly are, which
    shifts every function by about a rounding of the largest knot over a step: more for finer
    grids. So both are measured, on rows within the knots, against the layer in float64. The base
    activation has no part in the choice, and is left out.

    Args:
        layer: In float32.
    """
    some = _some_outputs(layer)
    rows = max(1, _NUMBERS_AT_ONCE // some.spline_weight[0].numel())
    parts = probes_within(layer).split(rows)
    exact = copy.deepcopy(some).double()
    answers = [exact(x.double()) for x in parts]

    def error(module: nn.Module) -> float:
        return max(
            float((module(x).double() - y).abs().max()) for x, y in zip(parts, answers, strict=True)
        )

    eager = error(some)
    if bool(is_uniform(layer.grid).all()) and layer.spline_order > 0:
        cardinal = error(LoweredKANLinear(some, "cardinal"))
        if cardinal <= CARDINAL_FACTOR * eager:
            return Choice("cardinal", cardinal, eager)
    return Choice("recursion", error(LoweredKANLinear(some, "recursion")), eager)


@contextmanager
def lowered(
    network: Network, choices: Mapping[str, Choice], precision: Precision = "fp32"
) -> Iterator[Call]:
    """Hold a network in the form that is exported; afterwards it is as it was."""
    samples = inputs_of_layers(network) if precision == "int8" else {}
    with torch.no_grad():
        forms = {
            module: LoweredKANLinear(
                network.layers[name], choices[name].form, precision, samples.get(name)
            ).eval()
            for name, module in network.replaced.items()
        }
    with swapped(network.call, forms):
        yield network.call


def probes_within(layer: KANLinear) -> Tensor:
    """Make rows at a layer's knots, inside its grid and in its margins, shape (rows, in)."""
    probes = make_kan_probes(layer.grid.numpy(), layer.spline_order, _ROWS_PER_GROUP)
    within = [group in _WITHIN_KNOTS for group in probes.groups]
    return torch.from_numpy(probes.inputs[0][within])


def own_tensors(network: nn.Module) -> set[str]:
    """Name the tensors of lowered layers, which are to be in the file as they are, not folded.

    Differences of knots are three times as many numbers, and weights of 16 bits would become 32.
    """
    return {
        f"{path}.{name}"
        for path, module in network.named_modules()
        if isinstance(module, LoweredKANLinear)
        for name, _ in (*module.named_parameters(), *module.named_buffers())
    }


def _groups(functions: int, features: int, form: Form) -> int:
    """Count the groups that hold at most so many numbers a row, or one function."""
    length = min(functions, max(1, _NUMBERS_A_ROW[form] // features))
    return math.ceil(functions / length)


def _side_by_side(basis: Sequence[Tensor], base: Tensor) -> Tensor:
    return torch.cat([*basis, base.unsqueeze(1)], dim=1).flatten(1)


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


def _fold(layer: KANLinear, basis: CardinalBasis | RecursiveBasis) -> Tensor:
    """Lay out all weights of a layer as the product wants them, shape (in * (G + k + 1), out)."""
    count = layer.grid_size + layer.spline_order
    weight = torch.empty(count + 1, layer.in_features, layer.out_features)
    weight[-1] = layer.base_weight.detach().T
    scaler = layer.spline_scaler.detach() if layer.enable_standalone_scale_spline else None
    order = [function for group in basis.functions for function in group]
    for row, function in zip(weight[:-1], order, strict=True):  # one at a time, for large layers
        values = layer.spline_weight.detach()[..., function].double() * basis.scale
        row.copy_((values if scaler is None else values * scaler).T)
    return weight.flatten(0, 1)


def _some_outputs(layer: KANLinear) -> KANLinear:
    """Take a layer with some of the outputs, evenly spread, and without its activation."""
    chosen = torch.linspace(0, layer.out_features - 1, min(_OUTPUTS, layer.out_features)).long()
    some = copy.copy(layer)
    some._parameters = {
        name: nn.Parameter(parameter.detach()[chosen], requires_grad=False)
        for name, parameter in layer._parameters.items()
        if parameter is not None
    }
    some.out_features = len(chosen)
    some._modules = {"base_activation": nn.Identity()}
    return some
