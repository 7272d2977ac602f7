"""What is understood of a state dict, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kan_model import KAN, CheckpointError, load_checkpoint, resolve_activation
from tests.states import good, saved, with_value, without


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("scaler", [True, False])
def test_everything_a_state_dict_tells_is_inferred(
    tmp_path: Path, order: int, scaler: bool
) -> None:
    original = KAN(
        [3, 5, 4, 2], grid_size=7, spline_order=order, enable_standalone_scale_spline=scaler
    )
    network = load_checkpoint(saved(tmp_path, original.state_dict()))
    assert [
        (
            layer.in_features,
            layer.out_features,
            layer.grid_size,
            layer.spline_order,
            layer.enable_standalone_scale_spline,
        )
        for layer in network.layers
    ] == [(a, b, 7, order, scaler) for a, b in [(3, 5), (5, 4), (4, 2)]]
    assert not network.training
    x = torch.randn(5, 3)
    assert torch.equal(network(x), original(x))


def test_layers_are_ordered_by_number(tmp_path: Path) -> None:
    original = KAN([2] * 12)
    network = load_checkpoint(saved(tmp_path, dict(sorted(original.state_dict().items()))))
    x = torch.randn(5, 2)
    assert torch.equal(network(x), original(x))


def test_a_single_bare_layer_is_a_network_of_one(tmp_path: Path) -> None:
    original = KAN([3, 2])
    network = load_checkpoint(saved(tmp_path, original.layers[0].state_dict()))
    x = torch.randn(5, 3)
    assert torch.equal(network(x), original(x))


@pytest.mark.parametrize(
    ("stored", "loaded"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_is_kept_or_raised_to_float32(
    tmp_path: Path, stored: torch.dtype, loaded: torch.dtype
) -> None:
    state = {key: value.to(stored) for key, value in good().items()}
    network = load_checkpoint(saved(tmp_path, state))
    assert {tensor.dtype for tensor in network.state_dict().values()} == {loaded}


def test_an_activation_with_weights_takes_them_from_the_file(tmp_path: Path) -> None:
    original = KAN([2, 3, 1], base_activation=lambda: nn.PReLU(init=0.7))
    path = saved(tmp_path, original.state_dict())
    network = load_checkpoint(path, resolve_activation("torch.nn:PReLU"))
    x = torch.randn(5, 2)
    assert torch.equal(network(x), original(x))
    with pytest.raises(
        CheckpointError, match=r"file has layers\.0\.base_activation\.weight \(1,\)"
    ):
        load_checkpoint(path)


BAD_STATES = [
    pytest.param(
        lambda: with_value(good(), "layers.1.grid", (2, 4), float("nan")),
        r"layers\.1\.grid: 1 of 36 values are not finite in float32, the first at \(2, 4\): nan",
        id="nan knot",
    ),
    pytest.param(
        lambda: with_value(good(), "layers.0.base_weight", (1, 0), float("inf")),
        r"layers\.0\.base_weight: 1 of 6 values are not finite .* the first at \(1, 0\): inf",
        id="infinite weight",
    ),
    pytest.param(
        lambda: with_value(good(), "layers.0.grid", (1, 5), -1.0),
        r"layers\.0\.grid: the knots of feature 1 do not rise .* knot 4 is .*, knot 5 is -1\.0",
        id="falling knots",
    ),
    pytest.param(
        lambda: good() | {"layers.1.base_weight": torch.zeros(1, 4)},
        r"layers\.1\.spline_weight: shape \(1, 3, 8\) does not agree with layers\.1\.base_weight "
        r"\(1, 4\)",
        id="base and spline differ",
    ),
    pytest.param(
        lambda: good() | {"layers.0.grid": torch.zeros(3, 12)},
        r"layers\.0\.grid: shape \(3, 12\) does not agree with layers\.0\.base_weight \(3, 2\); "
        r"expected \(2, 12\)",
        id="grid of other width",
    ),
    pytest.param(
        lambda: good() | {"layers.0.spline_scaler": torch.zeros(3, 3)},
        r"layers\.0\.spline_scaler: shape \(3, 3\).*expected \(3, 2\)",
        id="scaler of other shape",
    ),
    pytest.param(
        lambda: good() | {"layers.0.spline_weight": torch.zeros(3, 16)},
        r"layers\.0\.spline_weight: expected shape \(out, in, G \+ k\), found \(3, 16\)",
        id="spline of other rank",
    ),
    pytest.param(
        lambda: good() | {"layers.0.grid": torch.arange(15.0).expand(2, 15)},
        r"layers\.0\.grid: 15 knots .* mean spline order 6 and grid size 2; expected order 0 to 5",
        id="order 6",
    ),
    pytest.param(
        lambda: (
            dict(KAN([2, 3]).state_dict())
            | {
                key.replace("layers.0", "layers.1"): v
                for key, v in KAN([4, 1]).state_dict().items()
            }
        ),
        r"layers\.1\.base_weight: shape \(1, 4\) takes 4 features, but layers\.0\.base_weight of "
        r"shape \(3, 2\) gives 3",
        id="widths do not chain",
    ),
    pytest.param(
        lambda: without(good(), "layers.1.grid"),
        r"missing tensors: layers\.1\.grid; every layer",
        id="missing tensor",
    ),
    pytest.param(
        lambda: without(good(), *(k for k in good() if k.startswith("layers.0"))),
        r"missing tensors: layers\.0\.base_weight, layers\.0\.spline_weight, layers\.0\.grid",
        id="missing layer",
    ),
    pytest.param(
        lambda: good() | {"layers.99999.grid": torch.zeros(1, 4)},
        r"missing tensors: .*layers\.2\.base_weight",
        id="absurd layer number",
    ),
    pytest.param(
        lambda: good() | {"classifier.weight": torch.zeros(2, 2)},
        r"unexpected tensors: classifier\.weight",
        id="more than a KAN",
    ),
    pytest.param(
        lambda: good() | {"layers.0.grid": torch.arange(24).reshape(2, 12)},
        r"layers\.0\.grid: expected torch\.float16, .* found torch\.int64",
        id="integers",
    ),
    pytest.param(
        lambda: good() | {"layers.0.base_weight": good()["layers.0.base_weight"].to_sparse()},
        r"layers\.0\.base_weight: expected a dense tensor, found a sparse one",
        id="sparse",
    ),
    pytest.param(
        lambda: good() | {"layers.0.grid": torch.zeros(1).expand(2, 10**11)},
        r"layers\.0\.grid: shape \(2, 100000000000\) is 800000000000 bytes, the file has",
        id="larger than its file",
    ),
    pytest.param(
        lambda: good() | {"layers.0.grid": good()["layers.0.grid"][:, :-1].clone()},
        r"layers\.0\.grid: shape \(2, 11\) means grid size and order \(6, 2\), but "
        r"layers\.1\.grid of shape \(3, 12\) means \(5, 3\)",
        id="a lost knot",
    ),
    pytest.param(
        lambda: (
            with_value(
                {key: value.double() for key, value in good().items()},
                "layers.0.grid",
                (0, 4),
                -0.6,
            )
            | {"layers.1.spline_weight": torch.full((1, 3, 8), 1e300, dtype=torch.float64)}
        ),
        r"layers\.1\.spline_weight: 24 of 24 values are not finite in float32",
        id="too large for float32",
    ),
    pytest.param(
        lambda: (
            {key: value.double() for key, value in good().items()}
            | {"layers.0.grid": 1e8 + torch.arange(12, dtype=torch.float64).expand(2, 12)}
        ),
        r"layers\.0\.grid: the knots of feature 0 do not rise in float32",
        id="too close for float32",
    ),
    pytest.param(
        lambda: good() | {"evil\n\x1b[31m": torch.zeros(1)},
        r"unexpected tensors: 'evil\\n\\x1b\[31m'",
        id="control characters",
    ),
    pytest.param(
        lambda: (
            {
                key.removeprefix("layers.0."): value
                for key, value in KAN([2, 3]).state_dict().items()
            }
            | {"grid": torch.zeros(2, 12)}
        ),
        r"model\.pt: grid: the knots of feature 0 do not rise",
        id="a bare layer's own names",
    ),
    pytest.param(
        lambda: {"conv1.weight": torch.zeros(8, 3, 3, 3), "conv1.bias": torch.zeros(8)},
        r"holds no efficient-KAN layer: .* found conv1\.weight, conv1\.bias; .* with --model",
        id="another network",
    ),
    pytest.param(dict, r"the state dict is empty", id="empty state dict"),
    pytest.param(lambda: [1, 2], r"expected a state dict .* found a list", id="a list"),
    pytest.param(lambda: torch.zeros(3), r"expected a state dict .* found a Tensor", id="a tensor"),
]


@pytest.mark.parametrize(("make", "message"), BAD_STATES)
def test_what_is_wrong_is_named(tmp_path: Path, make: Any, message: str) -> None:
    path = saved(tmp_path, make())
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
