"""Base activations by name.

A state dict does not say which activation the base path uses, so its user must; these are the
names `--activation` understands.
"""

import pkgutil
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kan_model.errors import ActivationError

NAMED: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}

_OTHER_NAMES = {"swish": "silu", "linear": "identity"}

_OF_FUNCTION: dict[Callable[..., Tensor], Callable[[], nn.Module]] = {
    functional.silu: nn.SiLU,
    functional.gelu: nn.GELU,
    functional.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    functional.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
}


class FunctionActivation(nn.Module):
    """A function as a module, for layers whose base activation is one.

    Args:
        function: Acts on each element.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function; shape (...) to (...)."""
        return self.function(x)


def as_module(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Make a module of an activation function; torch's own of the same name, if there is one."""
    for known, make in _OF_FUNCTION.items():
        if function is known:  # some callables have no hash
            return make()
    return FunctionActivation(function)


def resolve_activation(name: str) -> Callable[[], nn.Module]:
    """Find the maker of a base activation.

    Args:
        name: One of `NAMED`, in capitals or not, or `package.module:Class`, which imports that
            module; anything callable without arguments that returns an `nn.Module` will do.

    Returns:
        A callable that makes a new module at each call.

    Raises:
        ActivationError: The name is unknown, cannot be imported, or does not make a module.
    """
    if name.lower() in NAMED:
        return NAMED[name.lower()]
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        other = _OTHER_NAMES.get(name.lower())
        hint = f" ({name} is {other})" if other else ""
        raise ActivationError(
            f"activation {name!r} is not known{hint}; expected one of {', '.join(NAMED)}, "
            "or package.module:Class"
        )
    try:
        factory = pkgutil.resolve_name(name)
        made = factory()
    except (Exception, SystemExit) as error:  # the user's own module may fail in any way
        raise ActivationError(
            f"activation {name!r} cannot be made: {_first_line(error)}; expected "
            "package.module:Class, importable from here and callable without arguments"
        ) from error
    if not isinstance(made, nn.Module):
        raise ActivationError(
            f"activation {name!r} makes a {type(made).__name__}, expected a torch.nn.Module"
        )
    require_elementwise(name, made)
    return factory  # type: ignore[no-any-return]


def activation_name(activation: nn.Module) -> str:
    """Name an activation as `--activation` does, or as Python shows it if it has settings."""
    for name, make in NAMED.items():
        if repr(activation) == repr(make()):
            return name
    return repr(activation)


def named_in_file(name: str) -> nn.Module | str:
    """Make the activation that a file names, which may not make us import what it likes.

    Args:
        name: As in `NAMED`, or one of torch.nn's in any spelling: `SiLU`, `torch.nn.SiLU`.

    Returns:
        The activation; `name` itself if it is not known.
    """
    if name.lower() in NAMED:
        return NAMED[name.lower()]()
    class_name = re.sub(r"^(torch\.)?(nn[.:])?(modules\.activation\.)?", "", name)
    maker = getattr(torch.nn.modules.activation, class_name, None)
    if not (isinstance(maker, type) and issubclass(maker, nn.Module)):
        return name
    try:
        return maker()
    except TypeError:  # it needs to be told more
        return name


def require_elementwise(name: str, activation: nn.Module) -> None:
    """Refuse what does not map each number to a number, or does so in place.

    Raises:
        ActivationError: Names the activation by `name`.
    """
    x = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.5, 2.0]])
    given = x.clone()
    try:
        with torch.no_grad():
            y = activation.eval()(given)
    except Exception as error:
        raise ActivationError(
            f"activation {name!r} fails on a tensor of shape (2, 3): {_first_line(error)}"
        ) from error
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        found = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
        raise ActivationError(
            f"activation {name!r} turns shape (2, 3) into {found}, expected an activation that "
            "acts on each element"
        )
    if not torch.equal(given, x):
        raise ActivationError(
            f"activation {name!r} works in place, so it would change what the splines see; name "
            "one that leaves its input alone"
        )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
