"""Efficient-KAN layers among the names of a state dict: where a KAN is, and what else there is.

Trainers wrap state dicts in dicts, wrappers put prefixes before names, networks hold a KAN as their
head. All of that is one prefix here: what stands before `layers.N.` or, for a layer by itself,
before its tensors' names. This module knows names, not what the tensors must look like.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from kan_model.errors import CheckpointError
from kan_model.families import recognise

RESAVE = "re-save it where it was trained: torch.save(model.state_dict(), 'model.pt')"
"""The remedy for a file that cannot be used as it is."""

GIVE_NETWORK = "give the network with --model package.module:factory"
"""The remedy for tensors that need code of their own; the network is exported as it is written."""

_OR_TRUST = (
    "; if you trust whoever made the file as you trust a program, --trust-pickle takes the "
    "pickled module itself"
)

REQUIRED = ("base_weight", "spline_weight", "grid")
"""What every layer has. `spline_scaler` is optional."""

_KEY = re.compile(
    r"(?P<stem>(?:.*\.)?)"
    r"(?P<tensor>base_weight|spline_weight|spline_scaler|grid|symbolic_mask|base_activation\..+)",
    re.DOTALL,
)
_NUMBERED = re.compile(r"(?P<prefix>(?:.*\.)?)layers\.(?P<index>0|[1-9]\d{0,5})\.", re.DOTALL)
# What torch.compile, activation checkpointing and FSDP put into names, anywhere.
_WRAPPED = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
_TRANSPARENT = ("torch.nn.parallel.", "torch.optim.swa_utils.")
_BOOKKEEPING = ("n_averaged",)  # torch's AveragedModel counts its updates
_LONGEST_SHOWN = 120
_MOST_LAYERS = 2_000
_MOST_COMPARED = 5_000_000  # each KAN with all names
_NOT_THE_NETWORKS = re.compile(r"optim|sched|scaler|ema|average|best|callback|rng", re.IGNORECASE)


@dataclass(frozen=True)
class StateDict:
    """Named tensors, as one part of a file holds them.

    Attributes:
        place: Keys of the dicts around it, each followed by a dot; empty at the top.
        tensors: By name.
        activations: The base activation of each layer of which the file tells it, by the layer's
            name: a module, or the name of one that cannot be made again.
        classes: Class of each module, by the module's name, if modules were pickled.
        oddities: What makes pickled modules compute something else than their tensors say, by the
            module's name.
        folded: What was folded into tensors that are not in the file as such, by their names.
        faults: Why a layer's tensor cannot be computed from what is in the file, by its name.
    """

    place: str
    tensors: Mapping[str, Tensor]
    activations: Mapping[str, nn.Module | str] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)
    oddities: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)


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
        lone: Whether it is one layer by itself.
        inside: Names of other tensors within the layers: they are of another kind.
        odd: What makes it compute something else than its tensors say.
        around: Classes of pickled modules around it, or in its place, of which only the tensors
            are known and not what they do.
        folded: As in `StateDict`, of its own tensors.
    """

    prefix: str
    layers: Mapping[int, Layer]
    lone: bool = False
    inside: Sequence[str] = ()
    odd: Sequence[str] = ()
    around: Sequence[str] = ()
    folded: Mapping[str, str] = field(default_factory=dict)


def clean_name(name: str) -> str:
    """Take what wrappers put into a name out of it."""
    return _WRAPPED.sub("", name)


def is_layer_tensor(name: str) -> bool:
    """Tell whether a layer of efficient-KAN may have a tensor of this name."""
    return _KEY.fullmatch(name) is not None


def is_bookkeeping(name: str) -> bool:
    """Tell whether a tensor only counts something."""
    return name.rpartition(".")[2] in _BOOKKEEPING


def find_stacks(state: StateDict) -> list[Stack]:
    """Find every KAN, and every KANLinear that is in none, by prefix.

    Raises:
        CheckpointError: There are more than anybody has.
    """
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
    found = [
        (prefix, dict(sorted(layers.items())), False)
        for prefix, layers in numbered.items()
        if any("spline_weight" in layer.tensors for layer in layers.values())
    ]
    found += [(stem, {0: layer}, True) for stem, layer in lone.items()]
    names = len(state.tensors) + len(state.classes)
    layers = sum(len(layers) for _, layers, _ in found)
    if layers > _MOST_LAYERS:
        raise CheckpointError(
            f"holds {len(found):,} KANs with {layers:,} layers, expected at most "
            f"{_MOST_LAYERS:,} layers; save only the KAN's own state dict"
        )
    if len(found) * names > _MOST_COMPARED:
        raise CheckpointError(
            f"holds {len(found):,} KANs among {names:,} tensors and modules, expected at most "
            f"{_MOST_COMPARED // names:,} KANs among that many; save only the KAN's own state dict"
        )
    known = {
        layer.stem + name
        for _, layers, _ in found
        for layer in layers.values()
        for name in layer.tensors
    }
    strays = [key for key in state.tensors if state.place + key not in known]
    return [
        Stack(
            state.place + prefix,
            layers,
            is_lone,
            inside=[k for k in strays if k.startswith(prefix if is_lone else f"{prefix}layers.")],
            odd=_odd(state, prefix),
            around=_unknown_around(state, prefix, "KANLinear" if is_lone else "KAN"),
            folded={
                state.place + key: kind
                for key, kind in state.folded.items()
                if key.startswith(prefix if is_lone else f"{prefix}layers.")
            },
        )
        for prefix, layers, is_lone in sorted(found, key=lambda entry: entry[0])
    ]


def _odd(state: StateDict, prefix: str) -> list[str]:
    own = prefix.removesuffix(".")
    return [
        f"{name or 'the module itself'} has {what}"
        for name, what in state.oddities.items()
        if name in ("", own) or name.startswith(prefix) or own.startswith(f"{name}.")
    ]


def _unknown_around(state: StateDict, prefix: str, expected: str) -> list[str]:
    """List the classes of which only the name is known: of the KAN, its layers, what holds it."""
    own = prefix.removesuffix(".")
    unknown = []
    for name, class_name in state.classes.items():
        if name == own:
            known = class_name.rpartition(".")[2] == expected
        elif name == "" or own.startswith(f"{name}."):
            known = class_name.startswith(_TRANSPARENT)
        elif name.startswith(prefix) and _NUMBERED.fullmatch(f"{name.removeprefix(prefix)}."):
            known = class_name.rpartition(".")[2] == "KANLinear"
        else:
            continue
        if not known:
            unknown.append(class_name)
    return list(dict.fromkeys(unknown))


def choose_stack(states: Sequence[StateDict], prefix: str | None = None) -> Stack:
    """Find the KAN that a file holds.

    Args:
        states: The parts of the file.
        prefix: The one to take, where the file holds several, or more than a KAN.

    Raises:
        CheckpointError: There is none, there are several, it is part of a larger network, or its
            layers are of another kind.
    """
    for state in states:
        for name, fault in state.faults.items():
            if (state.place + name).startswith(prefix or ""):
                raise CheckpointError(fault)
    found = [(state, stack) for state in states for stack in find_stacks(state)]
    stacks = [stack for _, stack in found]
    if not stacks:
        raise CheckpointError(_explain_absence(states))
    if prefix is not None:
        found = _behind(found, prefix)
    elif len(stacks) > 1:
        raise CheckpointError(_explain_many(stacks))
    state, stack = found[0]
    _require_kind(state, stack)
    rest = others(state, stack)
    if prefix is not None:
        exact = with_dot(stack.prefix) == with_dot(prefix)
        rest = [key for key in rest if not exact and (state.place + key).startswith(prefix)]
    if rest:
        raise CheckpointError(
            f"unexpected tensors: {listed(rest)}; the file holds more than the KAN at "
            f"{_shown(stack)}: give the whole network with --model package.module:factory, or "
            f"take the KAN alone with --prefix {stack.prefix!r}{_or_whole([stack])}"
        )
    return stack


def _behind(found: Sequence[tuple[StateDict, Stack]], prefix: str) -> list[tuple[StateDict, Stack]]:
    """Take the KAN that has a prefix, or the only one below it.

    Raises:
        CheckpointError: There is none, or there are several below.
    """
    asked = with_dot(prefix)
    chosen = [pair for pair in found if with_dot(pair[1].prefix) == asked]
    below = [pair for pair in found if asked and pair[1].prefix.startswith(asked)]
    if not chosen and not below:
        raise CheckpointError(
            f"no KAN has the prefix {prefix!r}; {_offer([stack for _, stack in found])}"
        )
    if not chosen and len(below) > 1:
        raise CheckpointError(
            f"{len(below)} KANs are below the prefix {prefix!r}; "
            f"{_offer([stack for _, stack in below])}"
        )
    return chosen or below


def with_dot(prefix: str) -> str:
    """End a prefix in one dot, unless it is empty."""
    stem = prefix.rstrip(".")
    return f"{stem}." if stem else ""


def others(state: StateDict, stack: Stack) -> list[str]:
    """List the tensors of a state dict that do not belong to a stack."""
    own = {layer.stem + name for layer in stack.layers.values() for name in layer.tensors}
    return [k for k in state.tensors if state.place + k not in own and not is_bookkeeping(k)]


def neighbours(states: Sequence[StateDict], stack: Stack) -> list[str]:
    """List the places of other state dicts that seem to belong to the same network."""
    return [
        state.place
        for state in states
        if not any(layer.stem.startswith(state.place) for layer in stack.layers.values())
        and not _NOT_THE_NETWORKS.search(state.place)
        and any(tensor.dim() > 1 for tensor in state.tensors.values())
    ]


def _require_kind(state: StateDict, stack: Stack) -> None:
    """Refuse layers that hold or do more than efficient-KAN's."""
    if stack.inside:
        layers = {k: t for layer in stack.layers.values() for k, t in layer.tensors.items()}
        family = recognise(layers | {key: state.tensors[key] for key in stack.inside})
        what = f"looks like {family.name}" if family else "holds layers of another kind"
        raise CheckpointError(
            f"unexpected tensors: {listed(stack.inside)}; a layer of efficient-KAN has "
            f"{', '.join(REQUIRED)} and maybe spline_scaler, so the file {what}, which computes "
            f"something else: {GIVE_NETWORK}"
        )
    if stack.odd:
        raise CheckpointError(
            f"{listed(stack.odd)}, so it may compute something else than its tensors say; "
            f"{GIVE_NETWORK}{_OR_TRUST}"
        )


def _explain_many(stacks: Sequence[Stack]) -> str:
    if not any(stack.lone for stack in stacks):
        return (
            f"holds {len(stacks)} KANs: {_offer(stacks)}; or give the network that joins them with "
            "--model package.module:factory"
        )
    return (
        f"holds KANLinear layers inside another network, at {listed([_shown(s) for s in stacks])}, "
        "and a state dict does not say how they are joined: give the network with --model "
        f"package.module:factory, or take one with --prefix {stacks[0].prefix!r}"
        f"{_or_whole(stacks)}"
    )


def _or_whole(stacks: Sequence[Stack]) -> str:
    """Name another way where a pickled module stands around."""
    return _OR_TRUST if any(stack.around for stack in stacks) else ""


def _offer(stacks: Sequence[Stack]) -> str:
    shown = listed([f"{stack.prefix!r} ({_described(stack)})" for stack in stacks])
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
                f"{listed(list(state.tensors))}), and what its layers compute is code, which is "
                f"not in the file: {GIVE_NETWORK}, and it is exported as it is written"
            )
    if any(_KEY.fullmatch(name) for name in names):
        found = {name.rpartition(".")[2] for name in names}
        return (
            f"missing tensors: every layer of efficient-KAN has {', '.join(REQUIRED)}, found "
            f"{listed(names)}; {missing_remedy([name for name in REQUIRED if name not in found])}"
        )
    return (
        "holds no efficient-KAN layer: expected names such as layers.0.base_weight, found "
        f"{listed(names) or 'none'}; if it is another network, give that with --model "
        "package.module:factory"
    )


def missing_remedy(missing: Sequence[str]) -> str:
    """Say what to do about tensors that are not in the file.

    Some forks keep their knots in no buffer, so no state dict has them.
    """
    if missing and all(name.rpartition(".")[2] == "grid" for name in missing):
        return f"if the layer keeps its knots in no buffer, {GIVE_NETWORK}, which has them"
    return RESAVE


def listed(names: Sequence[str], most: int = 6) -> str:
    """Show names, the first few of many, on one line whatever is in them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more


def printable(name: str) -> str:
    """Show a name on a terminal, whatever is in it and however long it is."""
    if len(name) > _LONGEST_SHOWN:
        name = f"{name[:_LONGEST_SHOWN]}..."
    return name if name.isprintable() else repr(name)
