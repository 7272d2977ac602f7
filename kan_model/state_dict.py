"""A state dict, names and tensors, to a validated KAN.

What a state dict tells is inferred from its shapes: widths, grid size, order, scaler, adapted
grids. What it cannot tell, the base activation, is the caller's to say. Everything else is refused,
with the tensor's name, what was expected, what was found, and what to do. This module reads no
files.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kan_model import splines
from kan_model.errors import CheckpointError
from kan_model.families import recognise
from kan_model.layer import KANLinear
from kan_model.model import KAN

RESAVE = "re-save it where it was trained: torch.save(model.state_dict(), 'model.pt')"
"""The remedy for a file that cannot be used as it is."""

_KEY = re.compile(
    r"layers\.(?P<index>0|[1-9]\d{0,5})\."
    r"(?P<tensor>base_weight|spline_weight|spline_scaler|grid|base_activation\..+)"
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REQUIRED = ("base_weight", "spline_weight", "grid")


@dataclass(frozen=True)
class _LayerShape:
    """What the shapes of one layer's tensors say."""

    in_features: int
    out_features: int
    grid_size: int
    spline_order: int
    standalone_scaler: bool


def build_network(state: Mapping[str, Tensor], base_activation: Callable[[], nn.Module]) -> KAN:
    """Build a network from the tensors of an efficient-KAN state dict.

    Args:
        state: Names `layers.N.base_weight` and so on, or those of a single bare KANLinear.
        base_activation: Makes the activation of the base path.

    Returns:
        The network in evaluation mode. It may share memory with `state`.

    Raises:
        CheckpointError: As in `load_checkpoint`.
    """
    if set(_REQUIRED) <= set(state):  # a single KANLinear, saved by itself
        stack = {f"layers.0.{key}": tensor for key, tensor in state.items()}
        try:
            return build_network(stack, base_activation)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace("layers.0.", "")) from error
    count = _count_layers(state)
    shapes = [_infer_shape(state, i) for i in range(count)]
    for i in range(count - 1):
        if shapes[i].out_features != shapes[i + 1].in_features:
            raise CheckpointError(
                f"layers.{i + 1}.base_weight: shape "
                f"{_shape(state, f'layers.{i + 1}.base_weight')} takes "
                f"{shapes[i + 1].in_features} features, but layers.{i}.base_weight of shape "
                f"{_shape(state, f'layers.{i}.base_weight')} gives {shapes[i].out_features}"
            )
        if _spline(shapes[i]) != _spline(shapes[i + 1]):
            raise CheckpointError(
                f"layers.{i}.grid: shape {_shape(state, f'layers.{i}.grid')} means grid size and "
                f"order {_spline(shapes[i])}, but layers.{i + 1}.grid of shape "
                f"{_shape(state, f'layers.{i + 1}.grid')} means {_spline(shapes[i + 1])}; "
                "efficient-KAN has the same in every layer, so one of them has lost knots"
            )
    _check_values(state)

    layers = []
    for shape in shapes:
        activation = base_activation()
        with torch.device("meta"):  # shapes only; the values come from the file
            layer = KANLinear(
                shape.in_features,
                shape.out_features,
                grid_size=shape.grid_size,
                spline_order=shape.spline_order,
                enable_standalone_scale_spline=shape.standalone_scaler,
            )
        layer.base_activation = activation
        layers.append(layer)
    network = KAN.from_layers(layers)
    _check_activation_tensors(network, state)

    dtypes = [tensor.dtype for tensor in state.values()]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    tensors = {
        key: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().contiguous()
        for key, tensor in state.items()
    }
    network.load_state_dict(tensors, assign=True)
    return network.to(dtype).eval()


def _spline(shape: _LayerShape) -> tuple[int, int]:
    return shape.grid_size, shape.spline_order


def _count_layers(state: Mapping[str, Tensor]) -> int:
    """Count the layers, and refuse names that are missing or do not belong."""
    parsed = {key: _KEY.fullmatch(key) for key in state}
    unexpected = [key for key, match in parsed.items() if match is None]
    if unexpected:
        raise CheckpointError(_explain_foreign_keys(state, unexpected))
    indices = {int(match["index"]) for match in parsed.values() if match}
    count = max(indices) + 1
    missing = [
        f"layers.{i}.{name}"
        # Up to the first gap and every layer that is there: a number may be absurd.
        for i in sorted(indices | set(range(min(count, len(indices) + 1))))
        for name in _REQUIRED
        if f"layers.{i}.{name}" not in state
    ]
    if missing:
        family = recognise(state)
        raise CheckpointError(
            f"missing tensors: {listed(missing)}; every layer of efficient-KAN has "
            f"{', '.join(_REQUIRED)}"
            + (f"; the file looks like {family}" if family else f"; {RESAVE}")
        )
    return count


def _explain_foreign_keys(state: Mapping[str, Tensor], unexpected: list[str]) -> str:
    family = recognise(state)
    if family:
        return (
            f"the file looks like {family}, not efficient-KAN (found {listed(unexpected)}); only "
            "efficient-KAN layers can be exported: export it from its own project"
        )
    prefixes = {match.group(1) for key in state if (match := re.match(r"(.+\.)layers\.\d+\.", key))}
    if len(prefixes) == 1 and all(key.startswith(tuple(prefixes)) for key in state):
        prefix = prefixes.pop()
        return (
            f"the names carry the prefix {prefix!r}; take it off: "
            f"torch.save({{k.removeprefix({prefix!r}): v for k, v in state.items()}}, 'model.pt')"
        )
    if any(_KEY.fullmatch(key) for key in state):
        return (
            f"unexpected tensors: {listed(unexpected)}; a layer of efficient-KAN has "
            f"{', '.join(_REQUIRED)} and maybe spline_scaler; save the KAN alone"
        )
    return (
        "holds no efficient-KAN layer: expected names such as layers.0.base_weight, found "
        f"{listed(unexpected)}"
    )


def _infer_shape(state: Mapping[str, Tensor], index: int) -> _LayerShape:
    """Infer a layer's sizes from its tensors: k = K - n - 1 and G = n - k."""
    stem = f"layers.{index}."
    base, spline, grid = (state[stem + name] for name in _REQUIRED)
    scaler = state.get(stem + "spline_scaler")
    for name, tensor, letters in (
        ("base_weight", base, "(out, in)"),
        ("spline_weight", spline, "(out, in, G + k)"),
        ("grid", grid, "(in, G + 2k + 1)"),
    ):
        if tensor.dim() != letters.count(",") + 1 or 0 in tensor.shape:
            raise CheckpointError(
                f"{stem}{name}: expected shape {letters}, found {_shape(state, stem + name)}"
                + _family_hint(state)
            )
    expected = {
        "spline_weight": (*base.shape, spline.shape[2]),
        "grid": (base.shape[1], grid.shape[1]),
    }
    if scaler is not None:
        expected["spline_scaler"] = tuple(base.shape)
    for name, shape in expected.items():
        if _shape(state, stem + name) != shape:
            raise CheckpointError(
                f"{stem}{name}: shape {_shape(state, stem + name)} does not agree with "
                f"{stem}base_weight {_shape(state, stem + 'base_weight')}; expected {shape}"
                + _family_hint(state)
            )
    order = grid.shape[1] - spline.shape[2] - 1
    grid_size = spline.shape[2] - order
    if not (0 <= order <= splines.MAX_ORDER and grid_size >= 1):
        raise CheckpointError(
            f"{stem}grid: {grid.shape[1]} knots ({_shape(state, stem + 'grid')}) and "
            f"{spline.shape[2]} coefficients (spline_weight "
            f"{_shape(state, stem + 'spline_weight')}) mean spline order {order} and grid size "
            f"{grid_size}; expected order 0 to {splines.MAX_ORDER} and at least one interval"
            + _family_hint(state)
        )
    out_features, in_features = base.shape
    return _LayerShape(in_features, out_features, grid_size, order, scaler is not None)


def _check_values(state: Mapping[str, Tensor]) -> None:
    """Refuse values that mean nothing, in the float32 in which they will be served."""
    for key, tensor in state.items():
        if tensor.dtype not in _DTYPES:
            if ".base_activation." in key:  # a counter or the like, as its module wants it
                continue
            raise CheckpointError(
                f"{key}: expected {', '.join(str(dtype) for dtype in _DTYPES)}, "
                f"found {tensor.dtype}"
            )
        bad = ~torch.isfinite(tensor.float())
        if bool(bad.any()):
            place = tuple(int(i) for i in torch.nonzero(bad)[0])
            raise CheckpointError(
                f"{key}: {int(bad.sum())} of {tensor.numel()} values are not finite in float32, "
                f"the first at {place}: {float(tensor[place])}; training has diverged (often in "
                "update_grid): take an earlier checkpoint"
            )
    for key, knots in state.items():
        if not key.endswith(".grid"):
            continue
        falls = knots.float().diff(dim=1) <= 0
        if bool(falls.any()):
            feature, j = (int(i) for i in torch.nonzero(falls)[0])
            raise CheckpointError(
                f"{key}: the knots of feature {feature} do not rise in float32: knot {j} is "
                f"{float(knots[feature, j])!r}, knot {j + 1} is {float(knots[feature, j + 1])!r}; "
                "repeated or falling knots make the spline undefined: retrain with a larger "
                "grid_eps or without that constant feature"
            )


def _check_activation_tensors(network: KAN, state: Mapping[str, Tensor]) -> None:
    """Compare the base activation's own tensors, if any, with those in the file."""
    mark = ".base_activation."
    wanted = {k: tuple(v.shape) for k, v in network.state_dict().items() if mark in k}
    found = {k: tuple(v.shape) for k, v in state.items() if mark in k}
    if wanted != found:
        raise CheckpointError(
            "the base activation's tensors do not agree: the activation chosen has "
            f"{_listed_shapes(wanted)}, the file has {_listed_shapes(found)}; name the activation "
            "the model was trained with (--activation torch.nn:PReLU, for one)"
        )


def _family_hint(state: Mapping[str, Tensor]) -> str:
    family = recognise(state)
    return f"; the file looks like {family}, not efficient-KAN" if family else ""


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    return tuple(state[key].shape)


def listed(names: list[str], most: int = 6) -> str:
    """Show names, the first few of many, on one line whatever is in them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = [name if name.isprintable() else repr(name) for name in names[:most]]
    return ", ".join(shown) + more


def _listed_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return listed([f"{name} {shape}" for name, shape in shapes.items()]) or "none"
