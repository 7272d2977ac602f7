"""The parts of a module, for a while: to put others in their place, or to see what reaches them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def replace_modules(
    root: nn.Module, replacements: Mapping[nn.Module, nn.Module]
) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put other modules in the place of some, everywhere in `root`.

    Returns:
        Where that was done: the parent, the name in it, and the module that was there.
    """
    done: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                done.append((parent, name, child))
                parent._modules[name] = replacements[child]
    return done


@contextmanager
def swapped(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of some, everywhere in `root`, for a while."""
    done = replace_modules(root, replacements)
    try:
        yield
    finally:
        for parent, name, child in done:
            parent._modules[name] = child


@contextmanager
def restored_attributes(root: nn.Module) -> Iterator[None]:
    """Give the attributes of all modules, and lists, dicts and sets in them, their contents back.

    A network that assigns attributes while it is traced would keep what stands for tensors there.
    """
    kept = [(vars(module), _copied(vars(module))) for module in root.modules()]
    try:
        yield
    finally:
        for attributes, before in kept:
            for value, content in before.values():
                if isinstance(value, dict | set):
                    value.clear()
                    value.update(content)
                elif isinstance(value, list):
                    value[:] = content
            attributes.clear()
            attributes.update({name: value for name, (value, _) in before.items()})


def _copied(attributes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keep every attribute, and a shallow copy of it if it is a container."""
    return {
        name: (value, copy.copy(value) if isinstance(value, dict | set | list) else None)
        for name, value in attributes.items()
    }


@contextmanager
def watched(layers: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """Note what reaches some layers, in the order of their calls."""
    reached: list[tuple[str, Tensor]] = []

    def look(name: str, given: Sequence[Any]) -> None:
        if given and isinstance(given[0], Tensor):
            reached.append((name, given[0].detach().clone()))

    hooks = [
        layer.register_forward_pre_hook(
            lambda _, by_place, by_name, name=name: look(name, [*by_place, *by_name.values()]),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        yield reached
    finally:
        for hook in hooks:
            hook.remove()
