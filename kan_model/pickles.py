"""A whole pickled module to names, tensors and activations, with nothing of it imported or run.

`torch.load(weights_only=True)` asks an allow-list for every class and function that a pickle names.
Here each of them is answered with an inert stand-in that keeps what the pickle says about the
object and can do nothing. A pickle that calls something, other than to make plain data, is refused.
This module reads no files.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kan_model.errors import CheckpointError

# Calls in pickles of plain data. The stand-in only keeps the arguments.
_DATA = frozenset(
    {
        *(f"pathlib.{name}" for name in ("PosixPath", "PurePosixPath", "WindowsPath")),
        *(f"pathlib._local.{name}" for name in ("PosixPath", "PurePosixPath", "WindowsPath")),
        *(f"datetime.{name}" for name in ("date", "datetime", "timedelta", "timezone")),
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
        "numpy.dtype",
        "torch.Generator",
        "uuid.UUID",
    }
)
_MAPPINGS = frozenset(
    {
        "collections.defaultdict",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    }
)


class Record:
    """An object of a pickle: its class's name and its state.

    Attributes:
        class_name: Module and name, as the pickle has them.
        state: Its attributes.
    """

    class_name: ClassVar[str]
    state: Mapping[str, Any]

    def __setstate__(self, state: Any) -> None:
        """Keep the state that the pickle sets. Slots come as a pair, of which the first counts."""
        if isinstance(state, tuple) and state:
            state = state[0]
        self.state = state if isinstance(state, Mapping) else {}


class RefusedCall(CheckpointError):
    """A pickle calls something that is not known to make plain data."""


class _StandIn(type):
    """A class of records. Making an object is harmless; being called is not what data does."""

    def __call__(cls, *args: Any) -> Any:
        name = cls.class_name  # type: ignore[attr-defined]
        if name in _MAPPINGS:
            return {}
        if name not in _DATA:
            raise RefusedCall(name)
        return cls.__new__(cls, *args)  # type: ignore[arg-type]


def stand_ins(names: Collection[str]) -> list[Any]:
    """Make the allow-list for `torch.serialization.safe_globals`.

    Args:
        names: Every class and function the pickle names and torch does not allow.

    Returns:
        Pairs of a stand-in and the name it answers.
    """
    return [(_stand_in(name), name) for name in sorted(names)]


def _stand_in(name: str) -> type:
    def make(cls: type[Record], *args: Any) -> Any:
        if name in _MAPPINGS:
            return {}
        record = object.__new__(cls)
        record.state = {}
        return record

    return _StandIn(name.rpartition(".")[2], (Record,), {"class_name": name, "__new__": make})


def is_module(value: object) -> bool:
    """Tell whether a record was a torch module."""
    return isinstance(value, Record) and {"_parameters", "_buffers", "_modules"} <= set(value.state)


def walk(record: Record, name: str = "") -> Iterator[tuple[str, Record]]:
    """List a module and those inside it, each with its qualified name.

    Raises:
        CheckpointError: A module holds itself, or something that is none.
    """
    yield from _walk(record, name, ())


def _walk(record: Record, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, Record]]:
    if id(record) in above:
        raise CheckpointError(f"{name or 'the module'}: holds itself, which no module does")
    yield name, record
    for key, child in _entries(record, "_modules"):
        inner = f"{name}.{key}" if name else key
        if is_module(child):
            yield from _walk(child, inner, (*above, id(record)))
        elif child is not None:
            raise CheckpointError(f"{inner}: expected a module, found a {type(child).__name__}")


def tensors_of(record: Record) -> dict[str, Tensor]:
    """Flatten a module's parameters and buffers, under the names a state dict would give them."""
    found = {}
    for name, module in walk(record):
        # A state dict holds no such buffers; but a grid is needed wherever it is.
        left_out = set(module.state.get("_non_persistent_buffers_set", ())) - {"grid"}
        for kind in ("_parameters", "_buffers"):
            for key, value in _entries(module, kind):
                if isinstance(value, Tensor) and key not in left_out:
                    found[f"{name}.{key}" if name else key] = value
    return found


def activations_of(record: Record) -> dict[str, nn.Module | str]:
    """Find the base activation of each KANLinear of a module.

    Returns:
        By the layer's qualified name: the activation, or the name of its class if it is not one
        of torch's own.
    """
    found: dict[str, nn.Module | str] = {}
    for name, module in walk(record):
        if module.class_name.rpartition(".")[2] != "KANLinear":
            continue
        value = dict(_entries(module, "_modules")).get(
            "base_activation", module.state.get("base_activation")
        )
        if isinstance(value, Record) or (isinstance(value, type) and issubclass(value, Record)):
            found[name] = _activation(value)
    return found


def hooked(record: Record) -> list[str]:
    """List the modules whose forward is changed by hooks, by qualified name."""
    return [
        name or "the module itself"
        for name, module in walk(record)
        if module.state.get("_forward_hooks") or module.state.get("_forward_pre_hooks")
    ]


def _entries(record: Record, kind: str) -> list[tuple[str, Any]]:
    entries = record.state.get(kind)
    return list(entries.items()) if isinstance(entries, Mapping) else []


_FUNCTIONS = {
    "torch.nn.functional.silu": nn.SiLU,
    "torch.nn.functional.gelu": nn.GELU,
    "torch._C._nn.gelu": nn.GELU,
    "torch.nn.functional.relu": nn.ReLU,
    "torch.relu": nn.ReLU,
    "torch.tanh": nn.Tanh,
}


def _activation(value: Record | type[Record]) -> nn.Module | str:
    """Make one of torch's own activations again from its record."""
    name = value.class_name
    if not isinstance(value, Record):  # the function itself
        return _FUNCTIONS[name]() if name in _FUNCTIONS else name
    module_name, _, class_name = name.rpartition(".")
    trusted = module_name in ("torch.nn.modules.activation", "torch.nn.modules.linear")
    maker = getattr(torch.nn, class_name, None) if trusted else None
    try:
        made: nn.Module = maker()  # type: ignore[misc]
    except TypeError:  # no class of torch's, or one that is no activation
        return name
    settings = {k: v for k, v in value.state.items() if k in vars(made) and not k.startswith("_")}
    for key, setting in settings.items():
        if type(setting) is not type(getattr(made, key)):
            return name
        if isinstance(setting, bool | int | float | str):
            setattr(made, key, setting)
    return made
