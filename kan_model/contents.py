"""What a file of torch.save's holds, once it is read: state dicts, and modules or records of them.

This module reads no files.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kan_model import pickles
from kan_model.activations import as_module
from kan_model.adoption import read_attribute
from kan_model.archives import LONGEST_NAME, MOST_NAMES
from kan_model.errors import CheckpointError
from kan_model.folding import is_foldable_hook
from kan_model.stacks import RESAVE, StateDict, clean_name, listed

_DEEPEST = 100  # dicts within dicts
_HOLDERS = (pickles.Record, nn.Module, dict, list, tuple)


def find_states(content: Any) -> Iterator[StateDict]:
    """Find every state dict in what a file holds, from the outside in, each object once.

    Raises:
        CheckpointError: There are more tensors or modules, or longer names, than a file may have.
    """
    seen: set[int] = set()
    names = 0
    # A place is written only when it is looked at: many may lie behind one long key.
    open_ends: list[tuple[Any, str, str | int, int]] = [(content, "", "", 0)]
    while open_ends:
        value, around, key, depth = open_ends.pop()
        if id(value) in seen or depth > _DEEPEST:
            continue
        # A place that is too long stays so; all of it might be written again and again.
        place = f"{around}{str(key)[:LONGEST_NAME]}."[: LONGEST_NAME + 1] if depth else ""
        inside: Iterable[tuple[object, Any]] = ()
        if pickles.is_module(value):
            found = pickles.walk(value, MOST_NAMES - names)
            names += pickles.count_entries(found)
            yield _state_of_record(value, found, place)
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
            for name in tensors:
                _require_short(place + name)
            names += len(tensors)
            if names > MOST_NAMES:
                raise CheckpointError(
                    f"holds more than {MOST_NAMES:,} tensors; save only the network's own state "
                    "dict"
                )
            if tensors:
                yield StateDict(place, tensors)
        elif isinstance(value, list | tuple):
            inside = enumerate(value)
        else:
            continue
        seen.add(id(value))
        held: dict[int, tuple[Any, str, str | int, int]] = {}  # each object once
        for inner, part in inside:
            if isinstance(inner, str | int) and isinstance(part, _HOLDERS):
                held.setdefault(id(part), (part, place, inner, depth + 1))
        open_ends += reversed(held.values())


def _require_short(name: str) -> None:
    if len(name) > LONGEST_NAME:
        raise CheckpointError(
            f"{listed([name])}: is a name of more than {LONGEST_NAME:,} characters; {RESAVE}"
        )


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


def _state_of_record(record: pickles.Record, found: pickles.Modules, place: str) -> StateDict:
    tensors = pickles.tensors_of(record)
    for name in tensors:
        _require_short(place + name)
    return StateDict(
        place,
        {clean_name(key): Tensor.detach(tensor) for key, tensor in tensors.items()},
        {clean_name(name): value for name, value in pickles.activations_of(record).items()},
        {name: module.class_name for name, module in found},
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
