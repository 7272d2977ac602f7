"""A user's own network: built by a function of theirs, with the weights of a checkpoint in it.

The function is code the user names on the command line, so it is run; the checkpoint is not.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.errors import NetworkError, cause
from kan_model.checkpoint import Checkpoint, check_storage
from kan_model.errors import CheckpointError
from kan_model.stacks import StateDict, is_bookkeeping, listed


def build_module(factory: str | Callable[[], nn.Module]) -> nn.Module:
    """Call the function that builds a network.

    Args:
        factory: The function, callable without arguments, or `package.module:factory`, importable
            from here.

    Raises:
        NetworkError: It cannot be found, fails, or makes something else.
    """
    reference = factory if isinstance(factory, str) else getattr(factory, "__name__", "factory")
    function = _import(factory) if isinstance(factory, str) else factory
    try:
        made = function()
    except (Exception, SystemExit) as error:
        raise NetworkError(
            f"--model {reference}: the factory fails: {cause(error)}; expected a function "
            "that takes no arguments and returns the network"
        ) from error
    if not isinstance(made, nn.Module):
        raise NetworkError(
            f"--model {reference}: expected a torch.nn.Module, found a {type(made).__name__}; "
            "return the network itself"
        )
    return made


def _import(reference: str) -> Callable[[], object]:
    module_name, colon, attribute = reference.partition(":")
    if not (colon and module_name and attribute):
        raise NetworkError(
            f"--model {reference}: expected package.module:factory, a function that builds the "
            "network"
        )
    try:
        factory: Any = pkgutil.resolve_name(reference)
    except (Exception, SystemExit) as error:  # the user's own module may fail in any way
        raise NetworkError(
            f"--model {reference}: cannot be imported: {cause(error)}; expected "
            "package.module:factory, importable from the current folder"
        ) from error
    return factory  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Fit:
    """How the names under one prefix of a state dict agree with a network's."""

    prefix: str
    tensors: Mapping[str, Tensor]
    missing: list[str]
    unexpected: list[str]

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.unexpected)


def load_weights(module: nn.Module, checkpoint: Checkpoint, prefix: str | None = None) -> str:
    """Put a checkpoint's weights into a network, all of them or none.

    A network built on the meta device takes the file's tensors as they are, without a copy.

    Args:
        module: Is changed.
        checkpoint: As read.
        prefix: What stands before the names in the file; found out if None.

    Returns:
        The prefix.

    Raises:
        NetworkError: Names or shapes do not agree, or the file holds several sets of weights.
    """
    wanted = module.state_dict()
    fits = [fit for state in checkpoint.states for fit in _fits(state, wanted, prefix)]
    if not fits:
        raise NetworkError(
            f"{checkpoint.path}: no tensors behind the prefix {prefix!r}; found "
            f"{listed([s.place + key for s in checkpoint.states for key in s.tensors])}"
        )
    best = min(fits, key=lambda fit: fit.faults)
    if best.faults:
        raise NetworkError(
            f"{checkpoint.path}: the names do not agree with the network's; missing in the file: "
            f"{listed(best.missing) or 'none'}; unexpected in the file: "
            f"{listed(best.unexpected) or 'none'}; build the network that was trained"
        )
    equals = [fit for fit in fits if not fit.faults]
    if len(equals) > 1:
        raise NetworkError(
            f"{checkpoint.path}: holds these weights {len(equals)} times, behind the prefixes "
            f"{listed([repr(fit.prefix) for fit in equals])}; choose with --prefix"
        )
    for name, tensor in best.tensors.items():
        try:
            check_storage(best.prefix + name, tensor, checkpoint.size)
        except CheckpointError as error:
            raise NetworkError(f"{checkpoint.path}: {error}") from error
        if tensor.shape != wanted[name].shape:
            raise NetworkError(
                f"{checkpoint.path}: {best.prefix}{name}: expected shape "
                f"{tuple(wanted[name].shape)} as in the network, found {tuple(tensor.shape)}; "
                "build the network that was trained"
            )
    assign = any(tensor.is_meta for tensor in wanted.values())
    try:
        module.load_state_dict(dict(best.tensors), assign=assign, strict=False)
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
    return best.prefix


def _fits(state: StateDict, wanted: Mapping[str, Tensor], prefix: str | None) -> list[_Fit]:
    """Try every prefix that would make some name of the file one of the network's."""
    names = list(wanted)
    tied = _tied(wanted)
    if prefix is not None:
        asked = prefix.rstrip(".") + "." if prefix else ""
        prefixes = {asked.removeprefix(state.place)} if asked.startswith(state.place) else set()
    else:
        last = max(names, key=len, default="")
        prefixes = {""} | {
            key.removesuffix(last) for key in state.tensors if key.endswith(f".{last}")
        }
    fits = []
    for found in sorted(prefixes):
        own = {
            key.removeprefix(found): tensor
            for key, tensor in state.tensors.items()
            if key.startswith(found)
            and (key.removeprefix(found) in wanted or not is_bookkeeping(key))
        }
        fits.append(
            _Fit(
                state.place + found,
                {name: tensor for name, tensor in own.items() if name in wanted},
                [
                    name
                    for name in names
                    if name not in own and not tied.get(name, set()) & set(own)
                ],
                [found + name for name in own if name not in wanted],
            )
        )
    return fits


def _tied(wanted: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Find the names of one and the same tensor, of which a file may hold one."""
    by_storage: dict[tuple[int, torch.Size], set[str]] = {}
    for name, tensor in wanted.items():
        if not tensor.is_meta and tensor.numel():
            by_storage.setdefault((tensor.data_ptr(), tensor.shape), set()).add(name)
    return {name: names for names in by_storage.values() for name in names}
