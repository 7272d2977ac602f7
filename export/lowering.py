"""KANLinear layers to the form that is exported: fast with standard operators, and as exact.

A layer becomes one matrix product,

    y = [B_0(x) | B_1(x) | ... | act(x)] @ weight,

with the scaler and the constant factors of the basis folded into the weight in float64. The base
path comes last, because its few terms tend to be the largest: in front of the others every later
addition is rounded to their size, and [16, 32, 8] is three times as far from float64 as it need be.

Which of the two forms of the basis (basis.py) a layer gets is measured. The untouched network stays
the reference; nothing here is trusted without the comparison in parity.py.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.basis import CardinalBasis, RecursiveBasis
from export.network import Call, Network, inputs_of_layers
from export.parts import swapped
from export.precision import Float32Product, HalfProduct, Int8Product
from export.probes import make_kan_probes
from kan_bundle.manifest import Form, Precision
from kan_model import KANLinear
from kan_model.splines import is_uniform

CARDINAL_FACTOR = 1.5
"""The closed form is taken if its error is at most this many times the error of eager's float32.

A file may have twice eager's error (reference.py); this leaves room for the layers after it.
"""

_ROWS_PER_GROUP = 64
_OUTPUTS = 64  # of a layer, which are enough to tell
_NUMBERS_AT_ONCE = 2**22  # of a basis in float64
_WITHIN_KNOTS = ("knots", "inside", "margin")


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
