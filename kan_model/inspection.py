"""What a checkpoint holds, told without exporting it.

Where an export stops at the first fault, this collects them, by the same rules.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from kan_model.activations import activation_name
from kan_model.checkpoint import Checkpoint, check_storage, read_checkpoint
from kan_model.errors import KanModelError
from kan_model.splines import is_uniform
from kan_model.stacks import REQUIRED, Layer, Stack, find_stacks, listed
from kan_model.state_dict import (
    check_symbolic,
    check_types,
    check_values,
    infer_shape,
    infer_shapes,
)

_UNEVEN = 1e3  # ratio of knot distances beyond which float32 visibly loses digits


@dataclass(frozen=True)
class LayerFacts:
    """One KANLinear.

    Attributes:
        name: Its name in the file.
        in_features: Width of the input.
        out_features: Width of the output.
        grid_size: G, the number of grid intervals.
        spline_order: k, the polynomial degree.
        grid: `uniform` or `adapted`.
        grid_range: Least and largest end of the grid over all features, in units of the input;
            None if a knot is not finite.
        standalone_scaler: Whether each edge has its own scale.
        base_activation: None if the file does not tell.
        parameters: Numbers that were trained.
        dtype: Of the spline weights.
    """

    name: str
    in_features: int
    out_features: int
    grid_size: int
    spline_order: int
    grid: str
    grid_range: tuple[float, float] | None
    standalone_scaler: bool
    base_activation: str | None
    parameters: int
    dtype: str


@dataclass(frozen=True)
class KanFacts:
    """One KAN, or one layer by itself.

    Attributes:
        kind: Which of the two.
        prefix: What stands before its names in the file.
        layers: Those whose tensors fit together.
        parameters: Numbers that were trained, in all of these.
        faults: Why it cannot be exported.
        unknown: What the file does not tell, and an export cannot find out.
        doubts: What looks wrong, and can be exported.
    """

    kind: Literal["KAN", "KANLinear"]
    prefix: str
    layers: tuple[LayerFacts, ...]
    parameters: int
    faults: tuple[str, ...]
    unknown: tuple[str, ...]
    doubts: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """A file.

    Attributes:
        file: Its path.
        size_bytes: Its size.
        format: `torch` or `safetensors`.
        kans: Every KAN found.
        other_tensors: Names of the tensors that belong to none of them.
        refused: Why an export without further options refuses the file; None if it does not.
    """

    file: str
    size_bytes: int
    format: str
    kans: tuple[KanFacts, ...]
    other_tensors: tuple[str, ...]
    refused: str | None


def inspect_checkpoint(
    path: Path,
    base_activation: Callable[[], nn.Module] | None = None,
    *,
    prefix: str | None = None,
    trust_pickle: bool = False,
) -> Inspection:
    """Tell what a file holds.

    Args:
        path: The file.
        base_activation: As given to an export.
        prefix: As given to an export.
        trust_pickle: Run the code in the file. Only for files from people whose programs you run.

    Raises:
        CheckpointError: The file cannot be read at all.
    """
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
    stacks = [stack for state in checkpoint.canonical_states for stack in find_stacks(state)]
    taken = {
        layer.stem + name
        for stack in stacks
        for layer in stack.layers.values()
        for name in layer.tensors
    }
    others = [
        state.place + key
        for state in checkpoint.canonical_states
        for key in state.tensors
        if state.place + key not in taken
    ]
    return Inspection(
        file=str(path),
        size_bytes=checkpoint.size,
        format=checkpoint.format,
        kans=tuple(_describe(checkpoint, stack, base_activation) for stack in stacks),
        other_tensors=tuple(others),
        refused=_refusal(checkpoint, prefix, base_activation),
    )


def _refusal(
    checkpoint: Checkpoint, prefix: str | None, base_activation: Callable[[], nn.Module] | None
) -> str | None:
    try:
        checkpoint.build_kan(checkpoint.find_kan(prefix), base_activation)
    except KanModelError as error:
        return str(error).removeprefix(f"{checkpoint.path}: ")
    return None


def _describe(
    checkpoint: Checkpoint, stack: Stack, base_activation: Callable[[], nn.Module] | None
) -> KanFacts:
    faults = list(_faults(checkpoint, stack))
    layers = []
    for layer in stack.layers.values():
        with suppress(KanModelError, KeyError):  # told among the faults
            for name, tensor in layer.tensors.items():
                check_storage(name, tensor, checkpoint.size)
            layers.append(_describe_layer(layer))
    return KanFacts(
        kind="KANLinear" if stack.lone else "KAN",
        prefix=stack.prefix,
        layers=tuple(layers),
        parameters=sum(layer.parameters for layer in layers),
        faults=tuple(faults),
        unknown=tuple(_unknown(stack, is_named=base_activation is not None)),
        doubts=tuple(_doubts(stack)) if not faults else (),
    )


def _faults(checkpoint: Checkpoint, stack: Stack) -> Iterator[str]:
    """Run the checks of an export; each works on what the ones before it have let pass."""
    if stack.inside:
        yield f"other tensors inside its layers: {listed(stack.inside)}"
    yield from stack.odd
    first: tuple[Callable[[Stack], object], ...] = (checkpoint.check_storages, infer_shapes)
    for check in (*first, check_symbolic, check_types, check_values):
        try:
            check(stack)
        except KanModelError as error:
            yield str(error)
            if check in first:
                return


def _describe_layer(layer: Layer) -> LayerFacts:
    shape = infer_shape(layer)
    knots = layer.tensors["grid"].float()
    k = shape.spline_order
    known = bool(torch.isfinite(knots).all())
    activation = layer.activation
    return LayerFacts(
        name=layer.stem.removesuffix("."),
        in_features=shape.in_features,
        out_features=shape.out_features,
        grid_size=shape.grid_size,
        spline_order=k,
        grid="uniform" if bool(is_uniform(knots).all()) else "adapted",
        grid_range=(float(knots[:, k].min()), float(knots[:, -1 - k].max())) if known else None,
        standalone_scaler=shape.standalone_scaler,
        base_activation=activation
        if not isinstance(activation, nn.Module)
        else activation_name(activation),
        parameters=sum(
            tensor.numel()
            for name, tensor in layer.tensors.items()
            if name not in ("grid", "symbolic_mask")
        ),
        dtype=str(layer.tensors["spline_weight"].dtype).removeprefix("torch."),
    )


def _unknown(stack: Stack, *, is_named: bool) -> Iterator[str]:
    if any(layer.activation is None for layer in stack.layers.values()):
        remedy = "it is as --activation says" if is_named else "name it with --activation"
        yield f"the base activation: {remedy}"
    yield "how inputs were scaled and shaped before they reached it"


def _doubts(stack: Stack) -> Iterator[str]:
    if stack.around:
        yield (
            f"a pickled {', '.join(stack.around)} stands around or in place of the KAN; what it "
            "computes besides is code, which is not in the file"
        )
    for layer in stack.layers.values():
        steps = layer.tensors["grid"].float().diff(dim=1)
        ratio = float((steps.amax(dim=1) / steps.amin(dim=1)).max())
        if ratio > _UNEVEN:
            feature = int((steps.amax(dim=1) / steps.amin(dim=1)).argmax())
            yield (
                f"{layer.stem}grid: the knots of feature {feature} are {ratio:.3g} times as far "
                "apart in one place as in another, as after update_grid on a constant or heavy-"
                "tailed feature; float32 loses digits between the close ones"
            )
        for name in REQUIRED[:2]:
            tensor = layer.tensors[name]
            if not bool(tensor.any()):
                yield f"{layer.stem}{name}: is zero everywhere, as before training"
        dtype = layer.tensors["spline_weight"].dtype
        if dtype != torch.float32:
            yield f"{layer.stem}spline_weight: is {dtype}; the exported files are float32"
