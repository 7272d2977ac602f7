"""Efficient-KAN layers among the names of a state dict: where a KAN is, and what else there is.

Trainers wrap state dicts in dicts, wrappers put prefixes before names, networks hold a KAN as their
head. All of that is one prefix here: what stands before `layers.N.` or, for a layer by itself,
before its tensors' names. This module knows names, not what the tensors must look like.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from kan_model.errors import CheckpointError
from kan_model.families import recognise

RESAVE = "re-save it where it was trained: torch.save(model.state_dict(), 'model.pt')"
"""The remedy for a file that cannot be used as it is."""

REQUIRED = ("base_weight", "spline_weight", "grid")
"""What every layer has. `spline_scaler` is optional."""

_KEY = re.compile(
    r"(?P<stem>(?:.*\.)?)"
    r"(?P<tensor>base_weight|spline_weight|spline_scaler|grid|symbolic_mask|base_activation\..+)"
)
_NUMBERED = re.compile(r"(?P<prefix>(?:.*\.)?)layers\.(?P<index>0|[1-9]\d{0,5})\.")
_TRANSPARENT = ("torch.nn.parallel.", "torch._dynamo.", "torch.optim.swa_utils.")
BOOKKEEPING = ("n_averaged",)  # torch's AveragedModel counts its updates


@dataclass(frozen=True)
class StateDict:
    """Named tensors, as one part of a file holds them.

    Attributes:
        place: Keys of the dicts around it, each followed by a dot; empty at the top.
        tensors: By name.
        activations: The base activation of each layer of which the file tells it, by the layer's
            name: a module, or the name of one that is not torch's.
        classes: Class of each module, by the module's name, if modules were pickled.
    """

    place: str
    tensors: Mapping[str, Tensor]
    activations: Mapping[str, nn.Module | str] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """The tensors of one KANLinear.

    Attributes:
        stem: What stands before the tensors' names in the file.
        tensors: By name, as `base_weight`.
        activation: As in `StateDict`; None if the file does not tell.
    """

    stem: str
    tensors: Mapping[str, Tensor]
    activation: nn.Module | str | None = None


@dataclass(frozen=True)
class Stack:
    """A KAN, or one layer by itself, in a state dict.

    Attributes:
        prefix: What stands before `layers.N.`, or before the layer's tensors; for `--prefix`.
        layers: By number. Numbers may be missing.
        rest: Names of the other tensors of the same state dict.
        lone: Whether it is one layer by itself.
        around: Classes of pickled modules around it, or in its place, of which only the tensors
            are known and not what they do.
    """

    prefix: str
    layers: Mapping[int, Layer]
    rest: Sequence[str] = ()
    lone: bool = False
    around: Sequence[str] = ()


def find_stacks(state: StateDict) -> list[Stack]:
    """Find every KAN, and every KANLinear that is in none, by prefix."""
    by_stem: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.tensors.items():
        if match := _KEY.fullmatch(key):
            by_stem.setdefault(match["stem"], {})[match["tensor"]] = tensor
    numbered: dict[str, dict[int, Layer]] = {}
    lone: dict[str, Layer] = {}
    for stem, tensors in by_stem.items():
        layer = Layer(state.place + stem, tensors, state.activations.get(stem.removesuffix(".")))
        if match := _NUMBERED.fullmatch(stem):
            numbered.setdefault(match["prefix"], {})[int(match["index"])] = layer
        elif set(REQUIRED) <= set(tensors):
            lone[stem] = layer
    stacks = []
    for prefix, layers in numbered.items():
        if any("spline_weight" in layer.tensors for layer in layers.values()):
            stacks.append((prefix, dict(sorted(layers.items())), False))
    stacks += [(stem, {0: layer}, True) for stem, layer in lone.items()]
    return [
        Stack(
            state.place + prefix,
            layers,
            [key for key in _others(state, layers) if key not in BOOKKEEPING],
            is_lone,
            _unknown_around(state, prefix, "KANLinear" if is_lone else "KAN"),
        )
        for prefix, layers, is_lone in sorted(stacks, key=lambda found: found[0])
    ]


def _others(state: StateDict, layers: Mapping[int, Layer]) -> Iterator[str]:
    own = {layer.stem + name for layer in layers.values() for name in layer.tensors}
    return (key for key in state.tensors if state.place + key not in own)


def _unknown_around(state: StateDict, prefix: str, expected: str) -> list[str]:
    own = prefix.removesuffix(".")
    unknown = []
    for name, class_name in state.classes.items():
        if name == own:
            known = class_name.rpartition(".")[2] == expected
        elif name == "" or own.startswith(f"{name}."):
            known = class_name.startswith(_TRANSPARENT)
        else:
            continue
        if not known:
            unknown.append(class_name)
    return unknown


def choose_stack(states: Sequence[StateDict], prefix: str | None = None) -> Stack:
    """Find the KAN that a file holds.

    Args:
        states: The parts of the file.
        prefix: The one to take, where the file holds several, or more than a KAN.

    Raises:
        CheckpointError: There is none, there are several, or it is part of a larger network.
    """
    found = [(state, stack) for state in states for stack in find_stacks(state)]
    if prefix is not None:
        for _, stack in found:
            if stack.prefix.rstrip(".") == prefix.rstrip("."):
                return stack
        raise CheckpointError(f"no KAN has the prefix {prefix!r}; {_offer(found)}")
    if not found:
        raise CheckpointError(_explain_absence(states))
    stacks = [stack for _, stack in found]
    if len(stacks) == 1 and not stacks[0].rest:
        return stacks[0]
    for state, stack in found:
        family = recognise(state.tensors)
        if family and stack.rest:
            raise CheckpointError(
                f"the file looks like {family.name}, not efficient-KAN (found "
                f"{listed(stack.rest)}); {family.remedy}"
            )
    kans = [stack for stack in stacks if not stack.lone]
    if len(stacks) == 1 and stacks[0].rest:
        raise CheckpointError(
            f"unexpected tensors: {listed(stacks[0].rest)}; the file holds more than the KAN at "
            f"{_shown(stacks[0])}: give the whole network with --model package.module:factory, or "
            f"take the KAN alone with --prefix {stacks[0].prefix!r}"
        )
    if len(kans) == len(stacks):
        raise CheckpointError(
            f"holds {len(kans)} KANs: {_offer(found)}; or give the network that joins them with "
            "--model package.module:factory"
        )
    raise CheckpointError(
        f"holds KANLinear layers inside another network, at {listed([_shown(s) for s in stacks])}, "
        "and a state dict does not say how they are joined: give the network with --model "
        f"package.module:factory, or take one with --prefix {stacks[0].prefix!r}"
    )


def _offer(found: Sequence[tuple[StateDict, Stack]]) -> str:
    if not found:
        return "the file holds none"
    shown = listed([f"{stack.prefix!r} ({_described(stack)})" for _, stack in found])
    return f"choose one with --prefix: {shown}"


def _shown(stack: Stack) -> str:
    return repr(stack.prefix) if stack.prefix else "the top"


def _described(stack: Stack) -> str:
    count = len(stack.layers)
    widths = [
        tuple(layer.tensors["base_weight"].shape)
        for layer in stack.layers.values()
        if "base_weight" in layer.tensors
    ]
    sizes = ", ".join(" x ".join(map(str, shape[::-1])) for shape in widths[:4])
    return f"{count} layer{'s' if count > 1 else ''}: {sizes}"


def _explain_absence(states: Sequence[StateDict]) -> str:
    """Say what a file without any efficient-KAN layer holds instead."""
    names = [state.place + key for state in states for key in state.tensors]
    for state in states:
        if family := recognise(state.tensors):
            return (
                f"the file looks like {family.name}, not efficient-KAN (found "
                f"{listed(list(state.tensors))}); {family.remedy}"
            )
    if any(_KEY.fullmatch(name) for name in names):
        return (
            f"missing tensors: every layer of efficient-KAN has {', '.join(REQUIRED)}, found "
            f"{listed(names)}; {RESAVE}"
        )
    return (
        "holds no efficient-KAN layer: expected names such as layers.0.base_weight, found "
        f"{listed(names)}"
    )


def listed(names: Sequence[str], most: int = 6) -> str:
    """Show names, the first few of many, on one line whatever is in them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = [name if name.isprintable() else repr(name) for name in names[:most]]
    return ", ".join(shown) + more
