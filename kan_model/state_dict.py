"""The tensors of a KAN to a validated network.

What a state dict tells is inferred from its shapes: widths, grid size, order, scaler, adapted
grids. What it cannot tell, the base activation, is the caller's to say. Everything else is refused,
with the tensor's name, what was expected, what was found, and what to do. This module reads no
files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from kan_model import splines
from kan_model.activations import require_elementwise
from kan_model.errors import ActivationError, CheckpointError
from kan_model.families import Family, recognise
from kan_model.layer import KANLinear
from kan_model.model import KAN
from kan_model.stacks import (
    GIVE_NETWORK,
    REQUIRED,
    Layer,
    Stack,
    listed,
    missing_remedy,
    printable,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LayerShape:
    """What the shapes of one layer's tensors say."""

    in_features: int
    out_features: int
    grid_size: int
    spline_order: int
    standalone_scaler: bool


def build_network(stack: Stack, base_activation: Callable[[], nn.Module] | None = None) -> KAN:
    """Build a network from the tensors of an efficient-KAN.

    Args:
        stack: As found in a file.
        base_activation: Makes the activation of the base path where the file does not tell it;
            SiLU if None. Where the file tells it, only the same one is accepted.

    Returns:
        The network in evaluation mode, in the widest dtype found, at least float32. It may share
        memory with `stack`.

    Raises:
        CheckpointError: Tensors are missing, misshapen or not finite, knots do not rise, or the
            activation contradicts the file.
    """
    shapes = infer_shapes(stack)
    for check in (check_symbolic, check_types, check_values):
        check(stack)
    tensors = [tensor for layer in stack.layers.values() for tensor in layer.tensors.values()]
    dtype = torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32
    layers = [
        _build_layer(layer, shape, _activation(layer, base_activation), dtype)
        for layer, shape in zip(stack.layers.values(), shapes, strict=True)
    ]
    return KAN.from_layers(layers).eval()


def infer_shapes(stack: Stack) -> list[LayerShape]:
    """Infer every layer's sizes, and compare neighbours.

    Raises:
        CheckpointError: Tensors are missing, or their shapes do not agree.
    """
    _require_complete(stack)
    layers = list(stack.layers.values())
    shapes = [infer_shape(layer) for layer in layers]
    for (left, left_shape), (right, right_shape) in pairwise(zip(layers, shapes, strict=True)):
        if left_shape.out_features != right_shape.in_features:
            raise CheckpointError(
                f"{right.stem}base_weight: shape {_shape(right, 'base_weight')} takes "
                f"{right_shape.in_features} features, but {left.stem}base_weight of shape "
                f"{_shape(left, 'base_weight')} gives {left_shape.out_features}"
            )
        if _spline(left_shape) != _spline(right_shape):
            raise CheckpointError(
                f"{left.stem}grid: shape {_shape(left, 'grid')} means grid size and order "
                f"{_spline(left_shape)}, but {right.stem}grid of shape {_shape(right, 'grid')} "
                f"means {_spline(right_shape)}; efficient-KAN has the same in every layer, so one "
                "of them has lost knots"
            )
    return shapes


def empty_layer(shape: LayerShape, activation: nn.Module) -> KANLinear:
    """Make a layer without values, on the meta device, for tensors that there are."""
    with torch.device("meta"):
        layer = KANLinear(
            shape.in_features,
            shape.out_features,
            grid_size=shape.grid_size,
            spline_order=shape.spline_order,
            enable_standalone_scale_spline=shape.standalone_scaler,
        )
    layer.base_activation = activation
    return layer


def check_types(stack: Stack) -> None:
    """Refuse tensors of integers and the like.

    Raises:
        CheckpointError: Names the tensor.
    """
    for key, tensor in _named(stack):
        # An activation may have a counter or the like, as its module wants it.
        if tensor.dtype not in _DTYPES and ".base_activation." not in f".{key}":
            raise CheckpointError(
                f"{key}: expected {', '.join(str(dtype) for dtype in _DTYPES)}, "
                f"found {tensor.dtype}"
            )


def check_values(stack: Stack) -> None:
    """Refuse values that mean nothing, in the float32 in which they will be served.

    Raises:
        CheckpointError: Names the tensor and the first such value.
    """
    for key, tensor in _named(stack):
        if tensor.dtype not in _DTYPES:
            continue
        bad = ~torch.isfinite(tensor.float())
        if bool(bad.any()):
            place = tuple(int(i) for i in torch.nonzero(bad)[0])
            raise CheckpointError(
                f"{key}: {int(bad.sum())} of {tensor.numel()} values are not finite in float32, "
                f"the first at {place}: {float(tensor[place])}; training has diverged (often in "
                "update_grid): take an earlier checkpoint"
            )
    for layer in stack.layers.values():
        knots = layer.tensors["grid"].float()
        falls = knots.diff(dim=1) <= 0
        if bool(falls.any()):
            feature, j = (int(i) for i in torch.nonzero(falls)[0])
            raise CheckpointError(
                f"{layer.stem}grid: the knots of feature {feature} do not rise in float32: knot "
                f"{j} is {float(knots[feature, j])!r}, knot {j + 1} is "
                f"{float(knots[feature, j + 1])!r}; efficient-KAN divides by their distance. If "
                f"the layer was trained on repeated knots, {GIVE_NETWORK}, and it is exported as "
                "it is written; else retrain with a larger grid_eps or without that feature"
            )


def knots_rise(layer: KANLinear) -> bool:
    """Tell whether each knot of a layer is above the one before it, in float32.

    B-splines are defined on repeated knots, too, but the recursion of efficient-KAN, which ours
    follows, then divides zero by zero.
    """
    return bool((layer.grid.detach().float().diff(dim=1) > 0).all())


def check_symbolic(stack: Stack) -> None:
    """Refuse what efficient-kan-plus has replaced by functions that are in no state dict.

    Raises:
        CheckpointError: Edges are masked.
    """
    for layer in stack.layers.values():
        mask = layer.tensors.get("symbolic_mask")
        if mask is not None and bool(mask.any()):
            raise CheckpointError(
                f"{layer.stem}symbolic_mask: {int((mask != 0).sum())} of {mask.numel()} edges are "
                "symbolic functions of efficient-kan-plus, which a state dict does not hold; undo "
                f"them with unfix_symbolic and save again, or {GIVE_NETWORK}, which sets the same "
                "functions"
            )


def _named(stack: Stack) -> Iterator[tuple[str, Tensor]]:
    for layer in stack.layers.values():
        for name, tensor in layer.tensors.items():
            if name != "symbolic_mask":
                yield layer.stem + name, tensor


def _activation(layer: Layer, base_activation: Callable[[], nn.Module] | None) -> nn.Module:
    """Take the activation that the file tells, or the one asked for."""
    found = layer.activation
    asked = None if base_activation is None else base_activation()
    if found is None:
        return nn.SiLU() if asked is None else asked
    where = f"{layer.stem}base_activation"
    if isinstance(found, str):
        if asked is not None and not found.startswith("torch.nn."):
            return asked
        raise ActivationError(
            f"{where}: is {printable(found)}, which cannot be made again from the file; "
            + (
                "give the network with --model package.module:factory"
                if found.startswith("torch.nn.")
                else "name it with --activation package.module:Class"
            )
        )
    if asked is not None and repr(asked) != repr(found):
        raise ActivationError(
            f"{where}: the file says {found!r}, but {asked!r} was asked for; leave --activation out"
        )
    try:
        require_elementwise(repr(found), found)
    except ActivationError as error:
        raise ActivationError(
            f"{where}: {error}; or give the network with --model package.module:factory"
        ) from error
    return found


def _build_layer(
    layer: Layer, shape: LayerShape, activation: nn.Module, dtype: torch.dtype
) -> KANLinear:
    built = empty_layer(shape, activation)
    _check_activation_tensors(built, layer)
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in layer.tensors.items()
        if name != "symbolic_mask"
    }
    built.load_state_dict(tensors, assign=True)
    return built.to(dtype)


def _spline(shape: LayerShape) -> tuple[int, int]:
    return shape.grid_size, shape.spline_order


def _require_complete(stack: Stack) -> None:
    """Refuse a stack in which layers or tensors are missing."""
    indices = set(stack.layers)
    some = next(iter(stack.layers.values()))
    base = some.stem if stack.lone else some.stem.rpartition("layers.")[0] + "layers."
    missing = [
        f"{base}{'' if stack.lone else f'{i}.'}{name}"
        # Up to the first gap and every layer that is there: a number may be absurd.
        for i in sorted(indices | set(range(min(max(indices) + 1, len(indices) + 1))))
        for name in REQUIRED
        if i not in indices or name not in stack.layers[i].tensors
    ]
    if missing:
        tensors = {k: t for layer in stack.layers.values() for k, t in _full_names(layer)}
        family = recognise(tensors)
        raise CheckpointError(
            f"missing tensors: {listed(missing)}; every layer of efficient-KAN has "
            f"{', '.join(REQUIRED)}"
            + (_resembles(family) if family else f"; {missing_remedy(missing)}")
        )


def infer_shape(layer: Layer) -> LayerShape:
    """Infer a layer's sizes from its tensors: k = K - n - 1 and G = n - k.

    Raises:
        CheckpointError: Their shapes do not agree.
    """
    stem = layer.stem
    base, spline, grid = (layer.tensors[name] for name in REQUIRED)
    scaler = layer.tensors.get("spline_scaler")
    for name, tensor, letters in (
        ("base_weight", base, "(out, in)"),
        ("spline_weight", spline, "(out, in, G + k)"),
        ("grid", grid, "(in, G + 2k + 1)"),
    ):
        if tensor.dim() != letters.count(",") + 1 or 0 in tensor.shape:
            raise CheckpointError(
                f"{stem}{name}: expected shape {letters}, found {_shape(layer, name)}"
                + _family_hint(layer)
            )
    expected = {
        "spline_weight": (*base.shape, spline.shape[2]),
        "grid": (base.shape[1], grid.shape[1]),
    }
    for name in ("spline_scaler", "symbolic_mask"):
        if name in layer.tensors:
            expected[name] = tuple(base.shape)
    for name, shape in expected.items():
        if _shape(layer, name) != shape:
            raise CheckpointError(
                f"{stem}{name}: shape {_shape(layer, name)} does not agree with "
                f"{stem}base_weight {_shape(layer, 'base_weight')}; expected {shape}"
                + _family_hint(layer)
            )
    order = grid.shape[1] - spline.shape[2] - 1
    grid_size = spline.shape[2] - order
    if not (0 <= order <= splines.MAX_ORDER and grid_size >= 1):
        raise CheckpointError(
            f"{stem}grid: {grid.shape[1]} knots ({_shape(layer, 'grid')}) and "
            f"{spline.shape[2]} coefficients (spline_weight {_shape(layer, 'spline_weight')}) mean "
            f"spline order {order} and grid size {grid_size}; expected order 0 to "
            f"{splines.MAX_ORDER} and at least one interval" + _family_hint(layer)
        )
    out_features, in_features = base.shape
    return LayerShape(in_features, out_features, grid_size, order, scaler is not None)


def _check_activation_tensors(built: KANLinear, layer: Layer) -> None:
    """Compare the base activation's own tensors, if any, with those in the file."""
    mark = "base_activation."
    wanted = {k: tuple(v.shape) for k, v in built.state_dict().items() if k.startswith(mark)}
    found = {k: tuple(v.shape) for k, v in layer.tensors.items() if k.startswith(mark)}
    if wanted != found:
        raise CheckpointError(
            "the base activation's tensors do not agree: the activation chosen has "
            f"{_listed_shapes(layer.stem, wanted)}, the file has "
            f"{_listed_shapes(layer.stem, found)}; name the activation the model was trained with "
            "(--activation torch.nn:PReLU, for one)"
        )


def _family_hint(layer: Layer) -> str:
    family = recognise(dict(_full_names(layer)))
    return _resembles(family) if family else ""


def _resembles(family: Family) -> str:
    return f"; the file looks like {family.name}, not efficient-KAN: {GIVE_NETWORK}"


def _full_names(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    return ((layer.stem + name, tensor) for name, tensor in layer.tensors.items())


def _shape(layer: Layer, name: str) -> tuple[int, ...]:
    return tuple(layer.tensors[name].shape)


def _listed_shapes(stem: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return listed([f"{stem}{name} {shape}" for name, shape in shapes.items()]) or "none"
