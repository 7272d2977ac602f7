"""A user's own network, built by a function of theirs.

The function is code the user names on the command line, so it is run. What it returns may be an
object that its owner goes on using, so a copy is exported.
"""

import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from export.errors import NetworkError, cause
from export.network import copy_module


def build_module(factory: str | Callable[[], nn.Module]) -> nn.Module:
    """Call the function that builds a network, and copy what it returns.

    Args:
        factory: The function, callable without arguments, or `package.module:factory`, importable
            from here.

    Returns:
        The copy, in evaluation mode. What is on the meta device stays there.

    Raises:
        NetworkError: It cannot be found, fails, makes something else, or makes what cannot be
            copied.
    """
    if isinstance(factory, nn.Module):
        raise NetworkError(
            f"--model: expected a function that returns the network, found the network itself, a "
            f"{type(factory).__name__}; give model=lambda: network"
        )
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
    plain: nn.Module = getattr(made, "_orig_mod", made)  # what torch.compile has wrapped
    return copy_module(plain, require_values=False).eval()


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
