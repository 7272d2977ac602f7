"""What networks return, as named tensors."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from export import NetworkError
from export.outputs import name_outputs, shape_of_row

A, B, C = (torch.full((2,), float(i)) for i in range(3))


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None


class State(NamedTuple):
    hidden: Tensor
    cell: Tensor | None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (A, {"output": A}),
        ((A, None), {"output": A}),
        ((A, None, B), {"output_0": A, "output_2": B}),
        ([A, [B, C]], {"output_0": A, "output_1_0": B, "output_1_1": C}),
        ([A, [B]], {"output_0": A, "output_1": B}),
        ({"a": A, "b": None}, {"a": A}),
        (OrderedDict(a={"b": A, "c": (B, C)}), {"a_b": A, "a_c_0": B, "a_c_1": C}),
        (Answer(A), {"logits": A}),
        (Answer(A, B), {"logits": A, "loss": B}),
        ((A, State(B, None)), {"output_0": A, "output_1_hidden": B}),
        ({"kv": ((A, B), (C,))}, {"kv_0_0": A, "kv_0_1": B, "kv_1": C}),
        ({0: A, "loss/ce": B}, {"output_0": A, "loss_ce": B}),
    ],
)
def test_outputs_are_named_by_the_way_to_them(found: Any, expected: dict[str, Tensor]) -> None:
    named = name_outputs(found)
    assert list(named) == list(expected)
    assert all(named[name] is tensor for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("text", r"found \{'output': 'str'\}; return a tensor"),
        ((None, None), "found nothing; return a tensor"),
        ({}, "found nothing"),
        ({"y": A, "n": 3}, r"found \{'n': 'int'\}; export a module .* alone: found\['y'\]"),
        ((A, object()), r"found \{'output_1': 'object'\}; export .* alone: found\[0\]"),
        ({"a": (B, C), "a_1": A}, r"found a_1 for found\['a'\]\[1\], found\['a_1'\]"),
        ({"a.b": A, "a_b": B}, "a name of its own for each output, found a_b"),
    ],
)
def test_what_is_no_tensor_or_has_no_name_of_its_own_is_refused(found: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        name_outputs(found)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 2, 8), (4, 3, 8)], r"the batch comes first .* returns h\.transpose\(0, 1\)"),
        ([(8, 4, 2), (8, 4, 3)], r"returns h\.transpose\(0, 2\)"),
        ([(), ()], "does not grow with the batch: .* leaves it out"),
        ([(10, 8), (15, 8)], r"returns h\.reshape\(-1, 5, \*h\.shape\[1:\]\)"),
        ([(7, 8), (8, 8)], "leaves it out, or returns what has a row for each"),
        ([(2, 8), (3, 9)], "leaves it out, or returns what has a row for each"),
    ],
)
def test_the_remedy_for_a_shape_makes_rows_of_it(
    shapes: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(NetworkError, match=message):
        shape_of_row("h", [torch.zeros(shape) for shape in shapes], [2, 3])
