"""KANLinear layers to the form that is exported: fast with standard operators, and as exact.

A layer becomes one matrix product,

    y = [B_0(x) | B_1(x) | ... | act(x)] @ weight,

with the scaler and the constant factors of the basis folded into the weight in float64. The base
path comes last, because its few terms tend to be the largest: in front of the others every later
addition is rounded to their size, and [16, 32, 8] is three times as far from float64 as it need be.

In an ONNX file such a layer can be one node, the fused operator of kan_ops, with what is written
here as its body (functions.py).

Which of the two forms of the basis (basis.py) a layer gets is measured. The untouched network stays
the reference; nothing here is trusted without the comparison in proof/parity.py.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import kan_ops
from export.conversion.basis import CardinalBasis, RecursiveBasis
from export.conversion.precision import Float32Product, HalfProduct, Int8Product
from export.conversion.symbolic import kan_linear
from export.errors import NetworkError, refused_samples
from export.network import Network
from export.parts import watched
from export.probes import make_kan_probes
from export.proof.eager import LARGEST_BATCH, evaluate
from kan_bundle.manifest import Form, Precision
from kan_model import KANLinear
from kan_model.activations import NAMED, activation_name
from kan_model.splines import is_uniform

CARDINAL_FACTOR = 1.5
"""The closed form is taken if its error is at most this many times the error of eager's float32.

A file may have twice eager's error (proof/reference.py); this leaves room for the layers after it.
"""

_ROWS_PER_GROUP = 64
_OUTPUTS = 64  # of a layer, which are enough to tell
_NUMBERS_AT_ONCE = 2**22  # of a basis in float64
_SAMPLES = 256  # rows that tell what reaches a layer,
_ROWS = 128  # of which so many are enough of each batch
_WITHIN_KNOTS = ("knots", "inside", "margin")


@dataclass(frozen=True)
class Choice:
    """The form of one layer, and what was measured for it.

    Attributes:
        form: How the basis is computed.
        error: Largest |y - y64| of the layer in this form, in float32, within its knots, at up to
            64 of its outputs.
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
    It costs a thirtieth of the time of a layer of 784 inputs (two AVX-512 cores, batch 256).
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
        name: What an ONNX file calls it, where it is the fused operator.
    """

    def __init__(
        self,
        layer: KANLinear,
        form: Form,
        precision: Precision = "fp32",
        samples: Tensor | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.name = name
        self.in_features = layer.in_features
        silu = type(layer.base_activation) is nn.SiLU
        self.activation = ExpSiLU() if silu else layer.base_activation
        knots, k = layer.grid, layer.spline_order
        self.basis = CardinalBasis(knots, k) if form == "cardinal" else RecursiveBasis(knots, k)
        # NaN and infinities must show in the answer; clamping and whole numbers lose them.
        self.loses_nan = k == 1 or (k > 1 and (form == "cardinal" or precision == "int8"))
        self.operator = (
            _attributes(layer, self.basis) if can_be_operator(layer, precision) else None
        )
        self.as_operator = False
        self.order = [function for group in self.basis.functions for function in group]
        weight = _fold(layer, self.basis, self.order)
        spline, base = weight[: -layer.in_features], weight[-layer.in_features :]
        self.product: nn.Module
        if precision == "fp32":
            self.product = Float32Product(weight)
        elif precision == "int8":
            points = probes_within(layer) if samples is None else samples
            self.product = Int8Product(spline, base, self.basis.peak, self.basis(points))
        else:
            dtype = torch.float16 if precision == "fp16" else torch.bfloat16
            self.product = HalfProduct(spline, base, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; shape (..., in) to (..., out)."""
        if self.as_operator:
            assert self.operator is not None
            assert isinstance(self.product, Float32Product)
            rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
            y: Tensor = kan_linear(
                rows, self.basis.knots, self.product.weight, self.operator, self.name
            )
            return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])
        base = self.activation(x)  # which may know its channels by their dimension
        if self.loses_nan:
            base = base + 0 * x
        leading = x.shape[:-1]
        if x.dim() != 2:
            x, base = (value.reshape(-1, self.in_features) for value in (x, base))
        if isinstance(self.product, Float32Product):
            y = self.product(self.basis(x, base))
        else:
            y = self.product(self.basis(x), base)
        return y if len(leading) == 1 else y.reshape(*leading, y.shape[-1])


@torch.no_grad()
def choose_form(layer: KANLinear) -> Choice:
    """Take the closed form where it is exact enough, else the recursion.

    The closed form takes the knots for equally spaced. In float32 they only nearly are, which
    shifts every function by about a rounding of the largest knot over a step: more for finer
    grids. So both are measured, on rows within the knots, against the layer in float64.

    Args:
        layer: In float32.
    """
    some = _some_outputs(layer)
    rows = max(1, _NUMBERS_AT_ONCE // some.spline_weight[0].numel())
    parts = probes_within(layer).split(rows)
    if not _acts_on_rows(layer.base_activation, parts[0]):
        some._modules = {"base_activation": nn.Tanh()}
    exact = copy.deepcopy(some).double()
    answers = [exact(x.double()) for x in parts]

    def error(module: nn.Module) -> float:
        """Find the largest error where the layer answers with numbers; NaN there is NaN."""
        off = [
            torch.where(y.isfinite(), (module(x).double() - y).abs(), 0.0).max()
            for x, y in zip(parts, answers, strict=True)
        ]
        return float(torch.stack(off).max())

    eager = error(some)
    if bool(is_uniform(layer.grid).all()) and layer.spline_order > 0:
        cardinal = error(LoweredKANLinear(some, "cardinal"))
        if cardinal <= CARDINAL_FACTOR * eager:
            return Choice("cardinal", cardinal, eager)
    return Choice("recursion", error(LoweredKANLinear(some, "recursion")), eager)


def choose_forms(network: Network) -> dict[str, Choice]:
    """Choose for every KANLinear of a network, by name.

    Raises:
        NetworkError: The weights of one are too large to be multiplied in float32.
    """
    choices = {name: choose_form(layer) for name, layer in network.layers.items()}
    for name, choice in choices.items():
        if not math.isfinite(choice.error + choice.eager_error):
            raise NetworkError(
                f"{name}: expected numbers, found NaN or infinity, in float32 and within its own "
                "knots: its weights, or weights times scaler, are too large; take an earlier "
                "checkpoint"
            )
    return choices


def lower_layers(
    network: Network, choices: Mapping[str, Choice], precision: Precision = "fp32"
) -> dict[nn.Module, LoweredKANLinear]:
    """Make the form that is exported of every KANLinear, by the module it stands for.

    Raises:
        NetworkError: The network fails on the samples that are to choose the scales of int8.
    """
    samples = _inputs_of_layers(network) if precision == "int8" else {}
    with torch.no_grad():
        return {
            module: LoweredKANLinear(
                network.layers[name], choices[name].form, precision, samples.get(name), name
            ).eval()
            for name, module in network.replaced.items()
        }


def _inputs_of_layers(network: Network) -> Mapping[str, Tensor]:
    """Run some samples, and take finite rows that reach each KANLinear, shape (rows, in).

    There are none without samples, or if none is finite.

    Raises:
        NetworkError: The network fails on the samples.
    """
    given = network.inputs.samples
    if given is None:
        return {}
    found: dict[str, Tensor] = {}
    chosen = np.unique(np.linspace(0, len(given[0]) - 1, _SAMPLES).astype(int))
    for start in range(0, len(chosen), LARGEST_BATCH):
        some = tuple(array[chosen[start : start + LARGEST_BATCH]] for array in given)
        with watched(network.replaced) as reached:
            try:
                evaluate(network.call, some, LARGEST_BATCH)
            except Exception as error:  # the network's own code may fail in any way
                raise refused_samples(error) from error
        for name, values in reached:
            rows = values.reshape(-1, network.layers[name].in_features)
            rows = rows[rows.isfinite().all(dim=1)]
            if len(rows):
                rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _ROWS)).long()]
                found[name] = torch.cat([found[name], rows]) if name in found else rows
    return found


def probes_within(layer: KANLinear) -> Tensor:
    """Make rows at a layer's knots, inside its grid and in its margins, shape (rows, in)."""
    probes = make_kan_probes(layer.grid.numpy(), layer.spline_order, _ROWS_PER_GROUP)
    within = [group in _WITHIN_KNOTS for group in probes.groups]
    return torch.from_numpy(probes.inputs[0][within])


def fusible(network: nn.Module) -> list[LoweredKANLinear]:
    """Find the layers that the fused operator can compute."""
    return [
        module
        for module in network.modules()
        if isinstance(module, LoweredKANLinear) and module.operator is not None
    ]


@contextmanager
def as_operators(layers: Sequence[LoweredKANLinear]) -> Iterator[None]:
    """Let an export to ONNX write layers as the fused operator."""
    for layer in layers:
        layer.as_operator = True
    try:
        yield
    finally:
        for layer in layers:
            layer.as_operator = False


def can_be_operator(layer: KANLinear, precision: Precision) -> bool:
    """Tell whether the fused operator computes such a layer."""
    activation = activation_name(layer.base_activation)
    return (
        precision == "fp32"
        and activation in kan_ops.ACTIVATIONS
        and type(layer.base_activation) is type(NAMED[activation]())
        and layer.spline_order in kan_ops.ORDERS
        and layer.grid_size <= kan_ops.MAX_GRID_SIZE
    )


def _attributes(
    layer: KANLinear, basis: CardinalBasis | RecursiveBasis
) -> Mapping[str, int | float | str]:
    return {
        "order": layer.spline_order,
        "grid_size": layer.grid_size,
        "groups": basis.groups,
        "scale": basis.scale,
        "activation": activation_name(layer.base_activation),
    }


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


def _fold(layer: KANLinear, basis: CardinalBasis | RecursiveBasis, order: Sequence[int]) -> Tensor:
    """Lay out all weights of a layer as the product wants them, shape (in * (G + k + 1), out).

    In memory each output's weights lie side by side, as in an nn.Linear: only then does torch add
    up a single row in several partial sums, and is as exact as eager. The ONNX file has its own
    order, and onnxruntime packs it as it likes.
    """
    count = layer.grid_size + layer.spline_order
    weight = torch.empty(layer.out_features, count + 1, layer.in_features).permute(1, 2, 0)
    weight[-1] = layer.base_weight.detach().T
    scaler = layer.spline_scaler.detach() if layer.enable_standalone_scale_spline else None
    for row, function in zip(weight[:-1], order, strict=True):  # one at a time, for large layers
        values = layer.spline_weight.detach()[..., function].double() * basis.scale
        row.copy_((values if scaler is None else values * scaler).T)
    return weight.flatten(0, 1)


def _some_outputs(layer: KANLinear) -> KANLinear:
    """Take a layer with some of the outputs, evenly spread."""
    chosen = torch.linspace(0, layer.out_features - 1, min(_OUTPUTS, layer.out_features)).long()
    some = copy.copy(layer)
    some._parameters = {
        name: nn.Parameter(parameter.detach()[chosen], requires_grad=False)
        for name, parameter in layer._parameters.items()
        if parameter is not None
    }
    some.out_features = len(chosen)
    some._modules = dict(layer._modules)
    return some


def _acts_on_rows(activation: nn.Module, rows: Tensor) -> bool:
    """Tell whether an activation takes (rows, in); some know channels by another dimension."""
    try:
        return bool(activation(rows).shape == rows.shape)
    except Exception:  # the user's own module may fail in any way
        return False
