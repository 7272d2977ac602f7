"""What is understood of a state dict, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kan_model import KAN, CheckpointError, load_checkpoint, resolve_activation
from tests.states import good, network_of, saved, with_value, without


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


@pytest.mark.parametrize("shape", [(12,), (1, 12)])
@pytest.mark.parametrize("alone", [False, True])
def test_one_row_of_knots_is_shared_by_all_features(
    tmp_path: Path, shape: tuple[int, ...], alone: bool
) -> None:
    torch.manual_seed(0)
    original = KAN([3, 2] if alone else [3, 5, 2])
    state = dict((original.layers[0] if alone else original).state_dict())
    for key in state:
        if key.endswith("grid"):
            state[key] = state[key][0].reshape(shape)
    path = saved(tmp_path, state)
    x = torch.randn(5, 3)
    assert torch.equal(load_checkpoint(path)(x), original(x))
    _, text = network_of(path)
    assert "one row of knots, which all features share, is folded into " in text
    assert text.count("grid") == (1 if alone else 2)


def test_shared_knots_that_do_not_fit_are_refused_by_shape(tmp_path: Path) -> None:
    state = good() | {"layers.0.grid": torch.arange(20.0)}
    with pytest.raises(CheckpointError, match=r"layers\.0\.grid: 20 knots .* mean spline order 11"):
        load_checkpoint(saved(tmp_path, state))
    state = good() | {"layers.0.grid": torch.zeros(2, 2, 12)}
    with pytest.raises(CheckpointError, match=r"layers\.0\.grid: expected shape \(in, G \+ 2k"):
        load_checkpoint(saved(tmp_path, state))


@pytest.mark.parametrize("prefix", ["model_ema.", "model_ema", "model_ema.module"])
def test_a_prefix_may_end_above_the_only_kan_below_it(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    ema = KAN([3, 2])
    content = {f"model_ema.module.kan.{k}": v for k, v in ema.state_dict().items()}
    content |= {f"model.kan.{k}": v for k, v in KAN([3, 2]).state_dict().items()}
    path = saved(tmp_path, content)
    x = torch.randn(5, 3)
    assert torch.equal(load_checkpoint(path, prefix=prefix)(x), ema(x))
    _, text = network_of(path, prefix=prefix)
    assert "KAN behind the prefix 'model_ema.module.kan.'" in text


@pytest.mark.parametrize("prefix", ["ema", "ema."])
def test_several_kans_below_a_prefix_are_listed_and_each_can_be_taken(
    tmp_path: Path, prefix: str
) -> None:
    torch.manual_seed(0)
    kans = {"ema.a.": KAN([3, 2]), "ema.b.": KAN([3, 4, 2]), "model.": KAN([3, 2])}
    content = {place + k: v for place, kan in kans.items() for k, v in kan.state_dict().items()}
    path = saved(tmp_path, content)
    with pytest.raises(
        CheckpointError, match=r"2 KANs are below .*'ema\.a\.' .*'ema\.b\.'"
    ) as error:
        load_checkpoint(path, prefix=prefix)
    assert "'model.'" not in str(error.value)
    x = torch.randn(5, 3)
    for place, kan in kans.items():
        assert torch.equal(load_checkpoint(path, prefix=place)(x), kan(x))


def test_a_prefix_is_whole_names_and_hides_nothing_beside_the_kan(tmp_path: Path) -> None:
    content = {f"ema.kan.{k}": v for k, v in good().items()}
    path = saved(tmp_path, content)
    with pytest.raises(CheckpointError, match=r"no KAN has the prefix 'em'; choose .*'ema\.kan\.'"):
        load_checkpoint(path, prefix="em")
    path = saved(tmp_path, content | {"ema.head.weight": torch.zeros(2, 2)})
    with pytest.raises(
        CheckpointError, match=r"unexpected tensors: ema\.head\.weight.*--prefix 'ema"
    ):
        load_checkpoint(path, prefix="ema")
    load_checkpoint(path, prefix="ema.kan.")


def test_repeated_knots_are_refused_with_the_network_as_the_way_out(tmp_path: Path) -> None:
    ends = torch.tensor([-1.0] * 3 + [-1, -0.6, -0.2, 0.2, 0.6, 1] + [1.0] * 3)
    state = good() | {"layers.0.grid": ends.expand(2, -1).contiguous()}
    with pytest.raises(CheckpointError, match=r"feature 0 do not rise.*--model package") as error:
        load_checkpoint(saved(tmp_path, state))
    assert "trained on repeated knots" in str(error.value)
