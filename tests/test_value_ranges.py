"""The whole numbers that networks accept, found by trial. The oracle is PyTorch itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from export import InputError
from export.inputs import read_inputs
from export.network import describe_network, example
from tests.networks import Written, written

INT64 = np.iinfo(np.int64)
TOKENS = "t:INT64=6"
ROWS = nn.Parameter(torch.ones(50, 3))


def table(rows: int = 50, **options: Any) -> nn.Embedding:
    return nn.Embedding(rows, 3, **options)


def ranges(network: nn.Module, shape: Any = None, samples: Any = None) -> list[Any]:
    found = describe_network(network, read_inputs(shape, samples))
    return [spec.allowed for spec in found.inputs.specs]


@pytest.mark.parametrize(
    ("network", "shape", "expected"),
    [
        (written(lambda s, t: s.e(t).mean(1), e=table()), TOKENS, (0, 49)),
        (written(lambda s, t: s.e(t).mean(1), e=table()), "t:INT32=6", (0, 49)),
        (written(lambda s, t: s.e(t.long()).mean(1), e=table()), "t:UINT8=6", (0, 49)),
        (written(lambda s, t: s.e(t), e=table(20)), "t:INT64=", (0, 19)),
        (written(lambda s, t: s.e(t).mean(1), e=table(padding_idx=0)), TOKENS, (0, 49)),
        (written(lambda s, t: s.e(t), e=nn.EmbeddingBag(50, 3)), TOKENS, (0, 49)),
        (written(lambda s, t: functional.one_hot(t, 5).float()), TOKENS, (0, 4)),
        (written(lambda s, t: s.e(t + 1).mean(1), e=table()), TOKENS, (-1, 48)),
        (written(lambda s, t: s.e(t - 1).mean(1), e=table()), TOKENS, (1, 50)),
        (written(lambda s, t: s.e(2 * t).mean(1), e=table()), TOKENS, (0, 24)),
        (written(lambda s, t: s.e(49 - t).mean(1), e=table()), TOKENS, (0, 49)),
        (written(lambda s, t: s.e[t].mean(1), e=ROWS), TOKENS, (-50, 49)),
        (written(lambda s, t: (s.a(t) + s.b(t)).mean(1), a=table(), b=table(9)), TOKENS, (0, 8)),
        (written(lambda s, t: s.e(t.T).mean(0), e=table()), TOKENS, (0, 49)),
        # What lies beyond is changed before it reaches the table, on one side or on both.
        (written(lambda s, t: s.e(t.clamp(min=0)).mean(1), e=table()), TOKENS, (INT64.min, 49)),
        (written(lambda s, t: s.e(t.clamp(0, 49)).mean(1), e=table()), TOKENS, None),
        (written(lambda s, t: s.e(t % 50).mean(1), e=table()), TOKENS, None),
        (written(lambda s, t: t.float() / 9), TOKENS, None),
        (written(lambda s, t: s.e(t.long()).mean(1), e=table(300)), "t:UINT8=6", None),
        # A bound must hold at every place of a row.
        (written(lambda s, t: s.a(t[:, 0]) + s.b(t[:, 1]), a=table(), b=table(9)), "t:INT64=2",
         (0, INT64.max)),
        (written(lambda s, t: s.a(t[:, 0]), a=table()), "t:INT64=2", None),
    ],
)  # fmt: skip
def test_the_range_is_what_the_network_accepts(
    network: Written, shape: str, expected: tuple[int, int] | None
) -> None:
    found = describe_network(network, read_inputs(shape, None))
    (spec,) = found.inputs.specs
    assert spec.allowed == expected
    for rows in example(found.inputs, 16):
        network(rows)
        if expected is not None:
            assert expected[0] <= int(rows.min()) <= int(rows.max()) <= expected[1]


def test_every_input_has_a_range_of_its_own_and_a_mask_has_none() -> None:
    def forward(s: Any, ids: torch.Tensor, kind: torch.Tensor, mask: torch.Tensor) -> Any:
        x = (s.e(ids) + s.k(kind)[:, None]) * mask[..., None]
        return x.sum(1) / mask.sum(1, keepdim=True)

    network = written(forward, e=table(), k=table(4))
    shapes = ["ids:INT64=6", "kind:INT64=", "mask:INT64=6"]
    found = describe_network(network, read_inputs(shapes, None))
    assert [spec.allowed for spec in found.inputs.specs] == [(0, 49), (0, 3), None]
    assert [note for note in found.notes if note.startswith("input mask: no range")]
    mask = example(found.inputs, 16)[2]
    assert set(mask.unique().tolist()) == {0, 1}
    assert bool((mask[:, 0] == 1).all())


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(np.arange(48).reshape(8, 6), (0, 49)), (np.full((8, 6), 7), (0, 49))],
)
def test_with_samples_the_range_is_found_too(samples: Any, expected: Any) -> None:
    network = written(lambda s, t: s.e(t).mean(1), e=table())
    assert ranges(network, samples=samples) == [expected]


def test_a_range_that_leaves_out_samples_is_not_claimed() -> None:
    """The first column reaches a larger table than the others: only the smallest number holds."""
    network = written(lambda s, t: s.a(t[:, 0]) + s.b(t[:, 1:]).sum(1), a=table(), b=table(9))
    samples = np.stack([np.arange(50), *[np.arange(50) % 9] * 5], axis=1)
    assert ranges(network, samples=samples) == [(0, INT64.max)]


def test_a_network_that_accepts_neither_0_nor_1_needs_samples() -> None:
    network = written(lambda s, t, u: s.e(t + u - 20).mean(1), e=table(9))
    with pytest.raises(InputError, match="rows of data for each of t, u with --samples NAME=FILE"):
        ranges(network, ["t:INT64=6", "u:INT64=6"])


def test_no_number_is_tried_that_is_far_from_what_is_known() -> None:
    tried: list[int] = []

    def forward(s: Any, t: torch.Tensor) -> torch.Tensor:
        tried.append(int(t.abs().max()))
        found: torch.Tensor = s.e((t + 2**40) % 50).mean(1)
        return found

    ranges(written(forward, e=table()), TOKENS)
    assert max(tried) <= 2**25


@pytest.mark.parametrize("fault", [RuntimeError("the private surface has changed")])
def test_without_observations_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(*_: Any) -> Callable[..., Any]:
        raise fault

    monkeypatch.setattr("export.value_ranges._record", fail)
    assert ranges(written(lambda s, t: s.e(t).mean(1), e=table()), TOKENS) == [None]
