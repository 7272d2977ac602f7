"""Notes of the values that a pickle would have torch build, and why a pickle is not opened."""

from dataclasses import dataclass, field
from typing import Any, TypeGuard

from kan_model.errors import CheckpointError
from kan_model.stacks import RESAVE

MOST_NUMBERS = 2**62
"""Of a tensor. Weights of nested values are cut there, too."""


class Refused(CheckpointError):
    """The pickle would take more than it may.

    Args:
        what: What it does.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"its pickle {what}, so it is not opened; {RESAVE}")


class TorchRefuses(CheckpointError):
    """The pickle has what torch's own reader refuses, or what is not known to it here."""


@dataclass(slots=True)
class Name:
    """A class, function or constant that the pickle names."""

    text: str


@dataclass(slots=True)
class Long:
    """A text that is too long for a name of a tensor."""

    size: int


@dataclass(slots=True)
class Group:
    """A tuple, list, dict or set.

    Attributes:
        kind: Which.
        items: Of a tuple or list.
        count: Of values in it.
        weight: Values in it and in tuples within it, as often as they are met: the cost of a hash.
    """

    kind: str
    items: list[Any] = field(default_factory=list)
    count: int = 0
    weight: int = 1


EMPTY = Group("tuple")
"""A tuple without values."""


@dataclass(slots=True)
class StorageNote:
    """Numbers of tensors.

    Attributes:
        size: Bytes.
        item: Bytes of a number.
    """

    size: int
    item: int


@dataclass(slots=True)
class Made:
    """What a call returns.

    Attributes:
        name: Of what was called.
        size: Bytes that a tensor claims, or of a text.
    """

    name: str
    size: int = 0


def is_tuple(value: object) -> TypeGuard[Group]:
    """Tell whether a value is a tuple."""
    return isinstance(value, Group) and value.kind == "tuple"


def as_tuple(items: list[Any]) -> Group:
    """Note a tuple of these values."""
    inner = sum(part.weight for part in items if isinstance(part, Group))
    weight = min(1 + len(items) + inner, MOST_NUMBERS)
    return Group("tuple", items, len(items), weight)
