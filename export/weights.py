"""The weights of a checkpoint into a network that its user has built.

Names must agree, up to what stands before all of them on either side: prefixes in the file, and
wrappers in the network. Where one side keeps a weight reparametrized, it is folded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.errors import NetworkError
from kan_model.checkpoint import Checkpoint, check_storage
from kan_model.errors import CheckpointError
from kan_model.folding import (
    Recipe,
    compute,
    describe_folds,
    find_recipes,
    fold_reparametrizations,
    plain_name,
)
from kan_model.stacks import StateDict, clean_name, is_bookkeeping, listed, with_dot


@dataclass(frozen=True)
class _Fit:
    """How the names behind one prefix of a state dict agree with a network's.

    Attributes:
        state: The state dict.
        prefix: What stands before the names in it, without the state dict's own place.
        wrapper: What stands before the names in the network.
        recipes: For tensors that the file holds as others, by their names in the network without
            the wrapper.
        names: Those that the file holds.
        missing: Names in the network.
        unexpected: Names in the file.
    """

    state: StateDict
    prefix: str
    wrapper: str
    recipes: Mapping[str, Recipe]
    names: Sequence[str]
    missing: Sequence[str]
    unexpected: Sequence[str]

    @property
    def place(self) -> str:
        """What stands before the names in the file."""
        return self.state.place + self.prefix

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.unexpected)

    def read(self, file_size: int) -> dict[str, Tensor]:
        """Take its tensors, by their names in the network.

        Raises:
            CheckpointError: One cannot be worked with or computed.
        """
        tensors = self.state.tensors
        parts = {part for recipe in self.recipes.values() for part in recipe.names}
        for key in (*(self.prefix + name for name in self.names), *sorted(parts)):
            check_storage(self.state.place + key, tensors[key], file_size)
        found = {self.wrapper + name: tensors[self.prefix + name] for name in self.names}
        for name, recipe in self.recipes.items():
            found[self.wrapper + name] = compute(self.prefix + name, recipe, tensors)
        return found


def load_weights(module: nn.Module, checkpoint: Checkpoint, prefix: str | None = None) -> list[str]:
    """Put a checkpoint's weights into a network, all of them or none.

    A network built on the meta device takes the file's tensors as they are, without a copy.

    Args:
        module: In evaluation mode. It is changed; its own reparametrizations are removed if the
            file holds the weights that they compute.
        checkpoint: As read.
        prefix: What stands before the names in the file, or before the one place where they are;
            found out if None.

    Returns:
        How the names were made to agree, for the user.

    Raises:
        NetworkError: Names or shapes do not agree, or the file holds several sets of weights.
    """
    fit = _find_fit(module, checkpoint, prefix)
    lines: list[str] = []
    if fit.faults and (removed := fold_reparametrizations(module)):
        lines = [
            f"{line}: the file holds the weights themselves"
            for line in describe_folds(removed, listed)
        ]
        fit = _find_fit(module, checkpoint, prefix)
    if fit.faults:
        raise NetworkError(
            f"{checkpoint.path}: the names do not agree with the network's; missing in the file: "
            f"{listed(fit.missing) or 'none'}; unexpected in the file: "
            f"{listed(fit.unexpected) or 'none'}; build the network that was trained"
        )
    try:
        tensors = fit.read(checkpoint.size)
    except CheckpointError as error:
        raise NetworkError(f"{checkpoint.path}: {error}") from error
    _assign(module, tensors, fit, checkpoint)
    if fit.place:
        lines.append(f"weights behind the prefix {fit.place!r}")
    if fit.wrapper:
        lines.append(f"weights of the network inside, {fit.wrapper.removesuffix('.')}")
    folded = {fit.place + name: recipe.kind for name, recipe in fit.recipes.items()}
    return lines + describe_folds(folded, listed)


def _assign(
    module: nn.Module, tensors: Mapping[str, Tensor], fit: _Fit, checkpoint: Checkpoint
) -> None:
    """Compare shapes, and load."""
    own = _tensors_of(module)
    for name, tensor in tensors.items():
        wanted = own[name][1]
        if tensor.shape != wanted.shape:
            raise NetworkError(
                f"{checkpoint.path}: {fit.place}{name.removeprefix(fit.wrapper)}: expected shape "
                f"{tuple(wanted.shape)} as in the network, found {tuple(tensor.shape)}; "
                "build the network that was trained"
            )
    assign = any(tensor.is_meta for _, tensor in own.values())
    named = {own[name][0]: tensor for name, tensor in tensors.items()}
    try:
        module.load_state_dict(named, assign=assign, strict=False)
    except RuntimeError as error:  # a module with a loading of its own
        raise NetworkError(f"{checkpoint.path}: {' '.join(str(error).split())}") from error
    left = [
        name
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_meta
    ]
    if left:
        raise NetworkError(
            f"--model: no value for {listed(left)}: built on the meta device and not in the file; "
            "build them on the CPU"
        )


def _tensors_of(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """List what a network wants to be loaded, with the names that it uses itself, by clean name."""
    return {
        clean_name(name): (name, tensor)
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def _find_fit(module: nn.Module, checkpoint: Checkpoint, prefix: str | None) -> _Fit:
    """Find where the weights are, or what comes nearest.

    Names that agree as they are come before those that agree without a wrapper of the network, and
    the prefix that was given before what is below it.

    Raises:
        NetworkError: They are in several places, or there is nothing behind the prefix.
    """
    own = {name: tensor for name, (_, tensor) in _tensors_of(module).items()}
    asked = None if prefix is None else with_dot(prefix)
    tries: list[list[_Fit]] = []
    for wrapper in _wrappers(list(own)):
        inside = {name.removeprefix(wrapper): tensor for name, tensor in own.items()}
        fits = [fit for state in checkpoint.states for fit in _fits(state, inside, wrapper, asked)]
        tries.append([fit for fit in fits if fit.place == asked])
        tries.append([fit for fit in fits if fit.place != asked])
    if asked is not None:
        tries = tries[::2] + tries[1::2]
    for fits in tries:
        exact = [fit for fit in fits if not fit.faults]
        if len(exact) > 1:
            raise NetworkError(
                f"{checkpoint.path}: holds these weights {len(exact)} times, behind the prefixes "
                f"{listed([repr(fit.place) for fit in exact])}; choose with --prefix"
            )
        if exact:
            return exact[0]
    every = [fit for fits in tries for fit in fits]
    if not every:
        raise NetworkError(
            f"{checkpoint.path}: no tensors behind the prefix {prefix!r}; found "
            f"{listed([s.place + key for s in checkpoint.states for key in s.tensors])}; leave "
            "--prefix out, or give what stands before the network's names"
        )
    return min(every, key=lambda fit: fit.faults)


def _wrappers(names: Sequence[str]) -> Iterator[str]:
    """List what stands before all names, from nothing on: '', 'net.', 'net.model.'."""
    found = ""
    while True:
        yield found
        heads = {name[len(found) :].partition(".")[:2] for name in names}
        if len(heads) != 1 or not (head := next(iter(heads)))[1]:
            return
        found += "".join(head)


def _fits(
    state: StateDict, wanted: Mapping[str, Tensor], wrapper: str, asked: str | None
) -> Iterator[_Fit]:
    """Try every prefix that would make some name of the file one of the network's.

    Args:
        state: Part of the file.
        wanted: Tensors of the network, by name without the wrapper.
        wrapper: What stands before all of the network's names. Without one a part of a state dict
            may be taken; else all that is there must be, as nothing else says that it is meant.
        asked: Prefix that the user gave, ending in a dot.
    """
    names = list(wanted)
    tied = _tied(wanted)
    last = max(map(plain_name, names), key=len, default="")
    heads = {key: plain_name(key) for key in state.tensors}
    prefixes = {""} | {
        plain.removesuffix(last) for plain in heads.values() if plain.endswith(f".{last}")
    }
    if asked is not None:
        prefixes.add(asked.removeprefix(state.place) if asked.startswith(state.place) else "")
        prefixes = {p for p in prefixes if (state.place + p).startswith(asked)}
    below = "" if asked is None else asked.removeprefix(state.place[: len(asked)])
    for prefix in sorted(prefixes):
        own = {key.removeprefix(prefix): key for key in state.tensors if key.startswith(prefix)}
        if asked is not None and not own:
            continue
        recipes = find_recipes(
            list(state.tensors), [prefix + name for name in names if name not in own]
        )
        used = {part for recipe in recipes.values() for part in recipe.names}
        there = {*own, *(name.removeprefix(prefix) for name in recipes)}
        scope = below if wrapper else prefix
        yield _Fit(
            state,
            prefix,
            wrapper,
            {name.removeprefix(prefix): recipe for name, recipe in recipes.items()},
            [name for name in own if name in wanted],
            [
                wrapper + name
                for name in names
                if name not in there and not tied.get(name, set()) & there
            ],
            [
                key
                for key in state.tensors
                if key.startswith(scope)
                and not (key.startswith(prefix) and key.removeprefix(prefix) in wanted)
                and key not in used
                and not is_bookkeeping(key)
            ],
        )


def _tied(wanted: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Find the names of one and the same tensor, of which a file may hold one."""
    by_storage: dict[tuple[int, torch.Size], set[str]] = {}
    for name, tensor in wanted.items():
        if not tensor.is_meta and tensor.numel():
            by_storage.setdefault((tensor.data_ptr(), tensor.shape), set()).add(name)
    return {name: names for names in by_storage.values() for name in names}
