"""What a pickle says, with nothing of it imported or run.

`torch.load(weights_only=True)` asks an allow-list for every class and function that a pickle names.
Here each of them is answered with an inert stand-in, which keeps what the pickle says about it and
can do nothing; a pickle that names what runs code is refused all the same. This module reads no
files.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kan_model.archives import LONGEST_NAME, MOST_NAMES
from kan_model.errors import CheckpointError
from kan_model.folding import is_foldable_hook, plain_name

_HARMLESS_BUILTINS = frozenset(
    f"builtins.{name}"
    for name in (
        *("bytearray", "complex", "dict", "float", "frozenset", "int", "list", "object", "range"),
        *("set", "slice", "str", "tuple", "bool", "bytes"),
        "getattr",  # of a stand-in gives another; enumerations are pickled that way
    )
)
_RUNS_CODE = (
    # subprocess is commands to pickles that Python 2 could read, which torch's are
    *("_io", "_pickle", "_posixsubprocess", "builtins", "code", "codeop", "commands", "ctypes"),
    *("functools.reduce", "importlib", "io", "marshal", "multiprocessing", "nt", "os", "pickle"),
    *("posix", "pty", "runpy", "shutil", "socket", "subprocess", "sys", "tempfile", "timeit"),
    *("torch.hub", "torch.jit", "torch.load", "torch.serialization"),
    *("torch.utils.cpp_extension", "types", "urllib", "webbrowser"),
)
_DEEPEST = 100
_KINDS = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks")
_MOST_SHOWN = 6
_LAYER_CHILDREN = {"base_activation"}
_OVERRIDES = ("forward", "b_splines", "scaled_spline_weight")


class Record:
    """An object of a pickle.

    Attributes:
        class_name: Module and name of its class, or of the function that made it.
        arguments: What the class or function was called with.
        state: Its attributes.
    """

    class_name: ClassVar[str]
    arguments: tuple[Any, ...]
    state: Mapping[str, Any]

    def __setstate__(self, state: Any) -> None:
        """Keep the state that the pickle sets. Slots come as a pair, of which the first counts."""
        if isinstance(state, tuple) and state:
            state = state[0]
        self.state = dict(state) if isinstance(state, dict) else {}


class RefusedCall(CheckpointError):
    """A pickle calls what runs code."""


class _StandIn(type):
    """A class of records. Its name in an error tells which class of the pickle it stands for."""

    class_name: str

    def __call__(cls, *args: Any) -> Any:
        if _runs_code(cls.class_name):
            raise RefusedCall(cls.class_name)
        return cls.__new__(cls, *args)  # type: ignore[arg-type]

    def __repr__(cls) -> str:
        return f"<stand-in {cls.class_name}>"


def stand_ins(names: Collection[str], mappings: Collection[str], lists: Collection[str]) -> Any:
    """Make the allow-list for `torch.serialization.safe_globals`.

    Args:
        names: Every class and function the pickle names and torch does not allow.
        mappings: Those of them that are a kind of dict.
        lists: Those of them that are a kind of list.

    Returns:
        Pairs of a stand-in and the name it answers.
    """
    kinds = dict.fromkeys(mappings, OrderedDict) | dict.fromkeys(lists, list)
    return [(_stand_in(name, kinds.get(name)), name) for name in sorted(names)]


def _stand_in(name: str, kind: Any) -> type:
    def make(cls: type[Record], *args: Any) -> Any:
        if kind is not None:
            return kind()
        record = object.__new__(cls)
        record.arguments, record.state = args, {}
        return record

    return _StandIn(name.rpartition(".")[2], (Record,), {"class_name": name, "__new__": make})


def _runs_code(name: str) -> bool:
    named = any(name == module or name.startswith(f"{module}.") for module in _RUNS_CODE)
    return named and name not in _HARMLESS_BUILTINS and name != "types.SimpleNamespace"


def is_module(value: object) -> bool:
    """Tell whether a record was a torch module."""
    return isinstance(value, Record) and {"_parameters", "_buffers", "_modules"} <= set(value.state)


def is_layer(record: Record) -> bool:
    """Tell whether a module holds what a KANLinear holds, or what it is computed from."""
    kinds = ("_parameters", "_buffers")
    own = {plain_name(str(key)) for kind in kinds for key, _ in _entries(record, kind)}
    return {"base_weight", "spline_weight"} <= own


Modules = list[tuple[str, Record]]
"""Modules with their qualified names."""


def count_entries(modules: Modules) -> int:
    """Count modules, and what is registered in each as often as it is."""
    return sum(1 + sum(len(_entries(record, kind)) for kind in _KINDS) for _, record in modules)


def walk(root: Record, most: int = MOST_NAMES) -> Modules:
    """List a module and those inside it, each with its qualified name.

    Args:
        root: The module.
        most: Modules, parameters and buffers that it may have.

    Raises:
        CheckpointError: A module holds something that is none, or there is no end of them.
    """
    found: Modules = []
    entries = 0
    open_ends = [("", root, 0)]
    while open_ends:
        name, record, depth = open_ends.pop()
        found.append((name, record))
        entries += count_entries(found[-1:])
        too_long = any(len(part) > LONGEST_NAME for part in (name, *_own_names(record)))
        if entries > most or depth > _DEEPEST or too_long:
            raise CheckpointError(
                f"the pickled module has more than {MOST_NAMES} modules inside, {_DEEPEST} within "
                f"each other, or names of more than {LONGEST_NAME} characters"
            )
        for key, child in reversed(_entries(record, "_modules")):
            inner = f"{name}.{key}" if name else str(key)
            if is_module(child):
                open_ends.append((inner, child, depth + 1))
            elif child is not None:
                raise CheckpointError(f"{inner}: expected a module, found a {type(child).__name__}")
    return found


def _own_names(record: Record) -> Iterator[str]:
    for kind in ("_parameters", "_buffers", "_modules"):
        keys: list[Any] = [key for key, _ in _entries(record, kind)]
        yield from (key for key in keys if isinstance(key, str))


def tensors_of(root: Record) -> dict[str, Tensor]:
    """Flatten a module's parameters and buffers, under the names a state dict would give them."""
    found = {}
    for name, module in walk(root):
        # A state dict holds no such buffers; but a grid is needed wherever it is.
        hidden = module.state.get("_non_persistent_buffers_set")
        left_out = set()
        if isinstance(hidden, set):
            left_out = {key for key, _ in _entries(module, "_buffers") if key in hidden} - {"grid"}
        if module.state.get("enable_standalone_scale_spline") is False:
            left_out.add("spline_scaler")  # its forward does not look at it
        for kind in ("_parameters", "_buffers"):
            for key, value in _entries(module, kind):
                if isinstance(value, Tensor) and not {key, plain_name(str(key))} & left_out:
                    found[f"{name}.{key}" if name else str(key)] = value
        grid = module.state.get("grid")  # a plain attribute in some copies
        if is_layer(module) and isinstance(grid, Tensor):
            found[f"{name}.grid" if name else "grid"] = grid
    return found


def activations_of(root: Record) -> dict[str, nn.Module | str]:
    """Find the base activation of each layer of a module.

    Returns:
        By the layer's qualified name: the activation, or the name of its class or function if it
        cannot be made again.
    """
    found: dict[str, nn.Module | str] = {}
    for name, module in walk(root):
        if is_layer(module):
            own = dict(_entries(module, "_modules"))
            value = own.get("base_activation", module.state.get("base_activation"))
            if isinstance(value, Record) or (isinstance(value, type) and issubclass(value, Record)):
                found[name] = _activation(value)
    return found


def oddities(root: Record) -> dict[str, str]:
    """Find what makes a KAN compute something else than its tensors say.

    Returns:
        By the module's qualified name: what was found.
    """
    found = {}
    for name, module in walk(root):
        children = {key for key, child in _entries(module, "_modules") if child is not None}
        expected = _LAYER_CHILDREN if is_layer(module) else {"layers"}
        overridden = [key for key in _OVERRIDES if key in module.state]
        if module.state.get("_forward_hooks") or not all(
            isinstance(hook, Record) and is_foldable_hook(hook.class_name)
            for _, hook in _entries(module, "_forward_pre_hooks")
        ):
            found[name] = "hooks"
        elif overridden:
            found[name] = f"a {overridden[0]} of its own"
        elif (is_layer(module) or module.class_name.rpartition(".")[2] == "KAN") and (
            extra := sorted(map(str, children - expected))
        ):
            more = f" and {len(extra) - _MOST_SHOWN} more" if len(extra) > _MOST_SHOWN else ""
            found[name] = f"more than its layers ({', '.join(extra[:_MOST_SHOWN])}{more})"
    return found


def _entries(record: Record, kind: str) -> list[tuple[str, Any]]:
    entries = record.state.get(kind)
    return list(dict.items(entries)) if isinstance(entries, dict) else []


_FUNCTIONS = {
    "torch.nn.functional.silu": nn.SiLU,
    "torch.nn.functional.relu": nn.ReLU,
    "torch.nn.functional.tanh": nn.Tanh,
    "torch._C._nn.gelu": nn.GELU,
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
    except TypeError:  # no class of torch's, or one that needs to be told more
        return name
    for key, setting in value.state.items():
        if key.startswith("_") or key not in vars(made):
            continue
        default = getattr(made, key)
        if isinstance(default, float) and type(setting) is int:
            setting = float(setting)
        if type(setting) is not type(default) or not isinstance(setting, bool | int | float | str):
            return name
        setattr(made, key, setting)
    return made
