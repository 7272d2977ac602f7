"""A checkpoint file, read without running anything in it, to a validated KAN.

What a state dict tells is inferred from its shapes: widths, grid size, order, scaler, adapted
grids. What it cannot tell, the base activation, is the caller's to say. Everything else is refused,
with the tensor's name, what was expected, what was found, and what to do.

This module never unpickles objects: `torch.load` runs with `weights_only=True` and no additions to
its allow-list.
"""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kan_model import splines
from kan_model.errors import CheckpointError
from kan_model.families import recognise
from kan_model.layer import KANLinear
from kan_model.model import KAN

RESAVE = "re-save it where it was trained: torch.save(model.state_dict(), 'model.pt')"
_KEY = re.compile(
    r"layers\.(?P<index>0|[1-9]\d{0,5})\."
    r"(?P<tensor>base_weight|spline_weight|spline_scaler|grid|base_activation\..+)"
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REQUIRED = ("base_weight", "spline_weight", "grid")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")


@dataclass(frozen=True)
class _LayerShape:
    """What the shapes of one layer's tensors say."""

    in_features: int
    out_features: int
    grid_size: int
    spline_order: int
    standalone_scaler: bool


def load_checkpoint(path: Path, base_activation: Callable[[], nn.Module] = nn.SiLU) -> KAN:
    """Read a plain efficient-KAN state dict into a network.

    Args:
        path: A file written by `torch.save(model.state_dict(), path)`.
        base_activation: Makes the activation of the base path; a state dict does not say which.

    Returns:
        The network in evaluation mode, in the widest dtype found in the file, at least float32.

    Raises:
        CheckpointError: The file cannot be read, is not a state dict, belongs to another family of
            networks, or holds tensors that are missing, misshapen, not finite, or knots that do
            not rise.
    """
    state = read_state_dict(path)
    try:
        return build_network(state, base_activation)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a file that maps names to tensors, and run nothing in it.

    Raises:
        CheckpointError: The file cannot be read or is something else.
    """
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: expected a checkpoint file, found a folder")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; copy or save it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the message below is the one that helps
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the parser fail in any way there is
        raise CheckpointError(f"{path}: {_explain_unreadable(path)}") from error
    return _as_state_dict(path, content, size)


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


def _explain_unreadable(path: Path) -> str:
    """Say why `torch.load` refused a file, without its traceback or its advice to trust it."""
    try:
        foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not even the list of names can be read
        foreign = []
    classes = {name.rpartition(".")[2] for name in foreign}
    if classes & {"KAN", "KANLinear"}:
        return (
            f"holds a whole pickled module ({', '.join(foreign)}), which only its own code can "
            f"open, so it is not opened; {RESAVE}"
        )
    if foreign:
        return (
            f"holds pickled objects ({', '.join(foreign)}) that would run code when loaded, so it "
            f"is not opened; {RESAVE}"
        )
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PK":
        return (
            "is damaged, truncated, or an archive that torch.save did not write (TorchScript "
            f"and .pt2 files hold programs, not checkpoints); {RESAVE}"
        )
    return f"is not a checkpoint written by torch.save, or is truncated; {RESAVE}"


def _as_state_dict(path: Path, content: Any, file_size: int) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a state dict (names to tensors), found a "
            f"{type(content).__name__}; {RESAVE}"
        )
    if not content:
        raise CheckpointError(f"{path}: the state dict is empty; {RESAVE}")
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            raise CheckpointError(
                f"{path}: is a training checkpoint with the weights under {wrapper!r}; take them "
                f"out: torch.save(torch.load({path.name!r})[{wrapper!r}], 'weights.pt')"
            )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: expected names to tensors, found {key!r}: {type(value).__name__}; "
                f"{RESAVE}"
            )
        _check_storage(path, key, value, file_size)
    return dict(content)


def _check_storage(path: Path, key: str, tensor: Tensor, file_size: int) -> None:
    """Refuse a tensor that cannot be worked with, before anything looks at its shape or values."""
    where = f"{path}: {_listed([key])}"
    kind = (
        "nested"
        if tensor.is_nested
        else "quantized"
        if tensor.is_quantized
        else "valueless (meta)"
        if tensor.is_meta
        else "sparse"
        if tensor.layout is not torch.strided
        else None
    )
    if kind:
        raise CheckpointError(
            f"{path}: {_listed([key])}: expected a dense tensor, found a {kind} one"
        )
    # A stride of zero lets a file of a few bytes claim any size.
    claimed = tensor.numel() * tensor.element_size()
    if claimed > 64 * file_size + 2**26:
        raise CheckpointError(
            f"{where}: shape {tuple(tensor.shape)} is {claimed} bytes, the file has {file_size}; "
            f"{RESAVE}"
        )


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
            f"missing tensors: {_listed(missing)}; every layer of efficient-KAN has "
            f"{', '.join(_REQUIRED)}"
            + (f"; the file looks like {family}" if family else f"; {RESAVE}")
        )
    return count


def _explain_foreign_keys(state: Mapping[str, Tensor], unexpected: list[str]) -> str:
    family = recognise(state)
    if family:
        return (
            f"the file looks like {family}, not efficient-KAN (found {_listed(unexpected)}); only "
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
            f"unexpected tensors: {_listed(unexpected)}; a layer of efficient-KAN has "
            f"{', '.join(_REQUIRED)} and maybe spline_scaler; save the KAN alone"
        )
    return (
        "holds no efficient-KAN layer: expected names such as layers.0.base_weight, found "
        f"{_listed(unexpected)}"
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


def _listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = [name if name.isprintable() else repr(name) for name in names[:most]]
    return ", ".join(shown) + more


def _listed_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return _listed([f"{name} {shape}" for name, shape in shapes.items()]) or "none"
