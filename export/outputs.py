"""What a network returns, as named tensors.

A tensor is named by the way to it: keys of dicts, fields of dataclasses and named tuples, and
places in tuples and lists, joined by `_`. None is left out, as GPT-like projects return it for a
loss; a tuple or list with a single tensor in it adds nothing to the name.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from export.errors import NetworkError

DEFAULT_OUTPUT = "output"


def name_outputs(found: Any) -> dict[str, Tensor]:
    """Flatten what a network returns.

    Args:
        found: A tensor, or tuples, lists, mappings, named tuples and dataclasses of such.

    Raises:
        NetworkError: There is something else in it, no tensor, or two of one name.
    """
    leaves = list(_leaves(found, "", "found"))
    strays = {
        name or DEFAULT_OUTPUT: type(value).__name__
        for name, _, value in leaves
        if not isinstance(value, Tensor)
    }
    tensors = [(name, way) for name, way, value in leaves if isinstance(value, Tensor)]
    if strays or not tensors:
        ways = ", ".join(way for _, way in tensors)
        remedy = "return a tensor, or a tuple or dict of tensors"
        if tensors:
            remedy = f"export a module around it that returns the tensors alone: {ways}"
        raise NetworkError(
            f"expected the network to return tensors, found {strays or 'nothing'}; {remedy}"
        )
    names = [_as_name(name) for name, _ in tensors]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        ways = ", ".join(
            way for name, (_, way) in zip(names, tensors, strict=True) if name in twice
        )
        raise NetworkError(
            f"expected a name of its own for each output, found {', '.join(twice)} for {ways}; "
            "export a module around it that returns them as a dict, with names of your own"
        )
    return dict(zip(names, (v for _, _, v in leaves), strict=True))


def shape_of_row(name: str, outputs: Sequence[Tensor], rows: Sequence[int]) -> tuple[int, ...]:
    """Find the sizes of one row of an output, from batches of different sizes.

    Raises:
        NetworkError: It has not one row for each row of the input.
    """
    shapes = [tuple(output.shape) for output in outputs]
    fits = all(shape[:1] == (n,) for shape, n in zip(shapes, rows, strict=True))
    if fits and len({shape[1:] for shape in shapes}) == 1:
        return shapes[0][1:]
    raise NetworkError(
        f"output {name}: expected one row for each row of the input, found shapes "
        f"{', '.join(map(str, shapes))} for {', '.join(map(str, rows))} rows; "
        f"{_remedy_for_shape(name, shapes, rows)}"
    )


def _remedy_for_shape(name: str, shapes: Sequence[tuple[int, ...]], rows: Sequence[int]) -> str:
    around = "export a module around the network"
    rank = min(map(len, shapes))
    for place in range(1, rank):
        if all(shape[place] == n for shape, n in zip(shapes, rows, strict=True)):
            if all(shape[0] == n for shape, n in zip(shapes, rows, strict=True)):
                return (
                    f"every row is combined with every other: {around} that returns what it "
                    "computes of each row alone, and combine the rows after it is served"
                )
            return (
                "the batch comes first in every input and output: "
                f"{around} that returns {name}.transpose(0, {place})"
            )
    if () in shapes and rows[shapes.index(())] == 1:
        return "write squeeze(-1) in place of squeeze(), which drops a batch of one as well"
    if len(set(shapes)) == 1:
        return f"it does not grow with the batch: {around} that leaves it out"
    per_row = [
        shape[0] // n if shape and shape[0] % n == 0 else 0
        for shape, n in zip(shapes, rows, strict=True)
    ]
    if len(set(per_row)) == 1 and per_row[0] > 1:
        return f"{around} that returns {name}.reshape(-1, {per_row[0]}, *{name}.shape[1:])"
    return f"{around} that leaves it out, or returns what has a row for each"


def _leaves(found: Any, name: str, way: str) -> Iterator[tuple[str, str, Any]]:
    """Walk to everything that is no container; None is nothing."""
    if found is None:
        return
    if isinstance(found, Tensor):
        yield name, way, found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _leaves(value, _join(name, str(key)), f"{way}[{key!r}]")
    elif isinstance(found, list | tuple):
        named = getattr(found, "_fields", None)
        alone = named is None and sum(value is not None for value in found) == 1
        for i, value in enumerate(found):
            if named is not None:
                yield from _leaves(value, _join(name, named[i]), f"{way}.{named[i]}")
            else:
                own = name if alone else _join(name or DEFAULT_OUTPUT, str(i))
                yield from _leaves(value, own, f"{way}[{i}]")
    elif is_dataclass(found) and not isinstance(found, type):
        for field in fields(found):
            value = getattr(found, field.name)
            yield from _leaves(value, _join(name, field.name), f"{way}.{field.name}")
    else:
        yield name, way, found


def _join(name: str, part: str) -> str:
    return f"{name}_{part}" if name else part


def _as_name(name: str) -> str:
    """Make a name that a tensor can have of a key."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", name or DEFAULT_OUTPUT)
    return f"{DEFAULT_OUTPUT}_{name}" if name[:1].isdigit() else name
