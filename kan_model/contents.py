"""What a file of torch.save's holds, once it is read: state dicts, and modules or records of them.

This module reads no files.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kan_model import pickles
from kan_model.activations import as_module
from kan_model.adoption import read_attribute
from kan_model.errors import CheckpointError
from kan_model.folding import is_foldable_hook
from kan_model.stacks import RESAVE, StateDict, clean_name, listed

_DEEPEST = 100  # dicts within dicts


def find_states(content: Any) -> Iterator[StateDict]:
    """Find every state dict in what a file holds, from the outside in, each object once.

    Raises:
        CheckpointError: A pickled module has no end.
    """
    seen: set[int] = set()
    open_ends: list[tuple[Any, str, int]] = [(content, "", 0)]
    while open_ends:
        value, place, depth = open_ends.pop()
        if id(value) in seen or depth > _DEEPEST:
            continue
        inside: list[tuple[object, Any]] = []
        if pickles.is_module(value):
            yield _state_of_record(value, place)
        elif isinstance(value, nn.Module):  # only where the pickle was trusted
            yield _state_of_module(value, place)
        elif isinstance(value, pickles.Record):
            inside = [*enumerate(value.arguments), *value.state.items()]
        elif isinstance(value, dict):
            inside = list(dict.items(value))
            tensors = {
                # What a pickle has hung on a tensor does not come along.
                clean_name(key): Tensor.detach(tensor)
                for key, tensor in inside
                if isinstance(key, str) and isinstance(tensor, Tensor)
            }
            if tensors:
                yield StateDict(place, tensors)
        elif isinstance(value, list | tuple):
            inside = list(enumerate(value))
        else:
            continue
        seen.add(id(value))
        open_ends += [
            (part, f"{place}{key}.", depth + 1)
            for key, part in reversed(inside)
            if isinstance(key, str | int)
        ]


def refuse_nested(states: Sequence[StateDict]) -> None:
    """Refuse tensors that do not even have a shape.

    Raises:
        CheckpointError: Names the tensor.
    """
    for state in states:
        for name, tensor in state.tensors.items():
            if tensor.is_nested:
                raise CheckpointError(
                    f"{listed([state.place + name])}: expected a dense tensor, found a nested one; "
                    f"{RESAVE}"
                )


def find_modules(content: Any) -> dict[str, nn.Module]:
    """Find the modules with weights that a trusted file holds, at its top or one dict below.

    Returns:
        By place, as in `StateDict`.
    """
    inside = list(dict.items(content)) if isinstance(content, dict) else [("", content)]
    return {
        f"{key}." if key != "" else "": value
        for key, value in inside
        if isinstance(key, str)
        and isinstance(value, nn.Module)
        and any(True for _ in (*value.parameters(), *value.buffers()))
    }


def _state_of_record(record: pickles.Record, place: str) -> StateDict:
    return StateDict(
        place,
        {clean_name(key): Tensor.detach(t) for key, t in pickles.tensors_of(record).items()},
        {clean_name(name): found for name, found in pickles.activations_of(record).items()},
        {name: module.class_name for name, module in pickles.walk(record)},
        pickles.oddities(record),
    )


def _state_of_module(module: nn.Module, place: str) -> StateDict:
    parts = dict(module.named_modules())
    activations = {
        name: found
        for name, part in parts.items()
        if callable(found := read_attribute(part, "base_activation"))
    }
    return StateDict(
        place,
        {
            clean_name(key): tensor
            for key, tensor in module.state_dict().items()
            if isinstance(tensor, Tensor)
        },
        {
            name: found if isinstance(found, nn.Module) else as_module(found)
            for name, found in activations.items()
        },
        {
            name: f"{type(part).__module__}.{type(part).__qualname__}"
            for name, part in parts.items()
        },
        {
            name: "hooks or a forward of its own"
            for name, part in parts.items()
            if part._forward_hooks
            or "forward" in vars(part)
            or not all(map(_is_foldable, part._forward_pre_hooks.values()))
        },
    )


def _is_foldable(hook: object) -> bool:
    return is_foldable_hook(f"{type(hook).__module__}.{type(hook).__qualname__}")


def explain_no_tensors(content: Any) -> str:
    """Say what a file without any tensor holds."""
    if isinstance(content, Mapping) and not content:
        return "the state dict is empty"
    kind = content.class_name if isinstance(content, pickles.Record) else type(content).__name__
    return f"expected a state dict (names to tensors), found a {kind} without any"
