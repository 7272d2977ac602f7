import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kan_model import KAN, ActivationError, CheckpointError, load_checkpoint, resolve_activation
from tests.conftest import GOLDENS

State = dict[str, Any]


def good() -> State:
    torch.manual_seed(0)
    return dict(KAN([2, 3, 1]).state_dict())


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    return path


def without(state: State, *keys: str) -> State:
    return {key: value for key, value in state.items() if key not in keys}


def with_value(state: State, key: str, index: tuple[int, ...], value: float) -> State:
    state[key] = state[key].clone()
    state[key][index] = value
    return state


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
        lambda: {f"module.{key}": value for key, value in good().items()},
        r"prefix 'module\.'; take it off",
        id="prefixed",
    ),
    pytest.param(
        lambda: {"epoch": 3, "model_state_dict": good()},
        r"training checkpoint with the weights under 'model_state_dict'",
        id="trainer checkpoint",
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
        r"holds no efficient-KAN layer: .* found conv1\.weight, conv1\.bias",
        id="another network",
    ),
    pytest.param(dict, r"the state dict is empty", id="empty state dict"),
    pytest.param(lambda: [1, 2], r"expected a state dict .* found a list", id="a list"),
    pytest.param(lambda: torch.zeros(3), r"expected a state dict .* found a Tensor", id="a tensor"),
    pytest.param(
        lambda: good() | {"epoch": 3}, r"names to tensors, found 'epoch': int", id="a number inside"
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD_STATES)
def test_what_is_wrong_is_named(tmp_path: Path, make: Any, message: str) -> None:
    path = saved(tmp_path, make())
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


FAMILIES: dict[str, dict[str, tuple[int, ...]]] = {
    "FastKAN": {"layers.0.rbf.grid": (8,), "layers.0.spline_linear.weight": (3, 16)},
    "FasterKAN": {
        "layers.0.rbf.grid": (8,),
        "layers.0.rbf.inv_denominator": (),
        "layers.0.spline_linear.weight": (3, 16),
    },
    "BSRBF-KAN": {
        "layers.0.base_weight": (3, 2),
        "layers.0.spline_weight": (3, 16),
        "layers.0.grid": (2, 12),
        "layers.0.rbf.grid": (8,),
    },
    "ChebyKAN": {"chebykan1.cheby_coeffs": (2, 3, 5), "chebykan1.arange": (5,)},
    "pykan": {
        "act_fun.0.grid": (2, 12),
        "act_fun.0.coef": (2, 3, 8),
        "act_fun.0.mask": (2, 3),
        "symbolic_fun.0.mask": (3, 2),
        "node_bias_0": (3,),
    },
    "torch-conv-kan": {
        "layers.0.base_weight": (3, 2),
        "layers.0.spline_weight": (3, 2, 8),
        "layers.0.layer_norm.weight": (3,),
        "layers.0.prelu.weight": (1,),
    },
    "efficient-kan-plus": {
        "layers.0.base_weight": (3, 2),
        "layers.0.spline_weight": (3, 2, 8),
        "layers.0.spline_scaler": (3, 2),
        "layers.0.grid": (2, 12),
        "layers.0.symbolic_mask": (3, 2),
    },
    "KANX": {
        "layers.0.base_weight": (2, 3),
        "layers.0.spline_weight": (2, 3, 8),
        "layers.0.grid": (2, 6),
    },
    "Wav-KAN": {
        "layers.0.scale": (3, 2),
        "layers.0.translation": (3, 2),
        "layers.0.wavelet_weights": (3, 2),
    },
    "FourierKAN": {"fouriercoeffs": (2, 3, 2, 5), "bias": (1, 3)},
    "SineKAN": {"layers.0.amplitudes": (3, 2, 5), "layers.0.phase": (1, 1, 2, 5)},
    "LKAN": {"layers.0.coeff": (3, 2, 8), "layers.0.scale_base": (3, 2)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_refused_by_name(tmp_path: Path, family: str) -> None:
    state = {key: torch.rand(shape) for key, shape in FAMILIES[family].items()}
    with pytest.raises(CheckpointError, match=f"looks like {family}"):
        load_checkpoint(saved(tmp_path, state))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(b"hello, world", "is not a checkpoint written by torch.save", id="text"),
        pytest.param(bytes(1000), "is not a checkpoint written by torch.save", id="zeros"),
        pytest.param(b"PK\x03\x04" + bytes(100), "is damaged, truncated", id="broken archive"),
        pytest.param(b"<html>404</html>", "is not a checkpoint", id="web page"),
        pytest.param(pickle.dumps({"a": 1}), "is not a checkpoint|expected names", id="pickle"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.9999])
def test_truncated_checkpoints_are_refused(tmp_path: Path, share: float) -> None:
    whole = saved(tmp_path, good()).read_bytes()
    path = tmp_path / "truncated.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="found a folder"):
        load_checkpoint(tmp_path)


def test_a_torchscript_archive_is_refused_without_a_warning(repository: Path) -> None:
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_checkpoint(repository / "uniform_4x8x3" / "1" / "model.ts")


def test_a_whole_pickled_module_is_refused_with_its_remedy() -> None:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(GOLDENS / "pickled_module_4x6x2.pt")
    message = str(error.value)
    assert "whole pickled module (efficient_kan.kan.KAN" in message
    assert "torch.save(model.state_dict(), 'model.pt')" in message


class Payload:
    """Would write a file when unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._trace,))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_never_runs(tmp_path: Path, legacy: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "model.pt"
    content = OrderedDict(good()) | {"layers.0.extra": Payload(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"would run code when loaded|is not a checkpoint"):
        load_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload must be a real one"


def in_place() -> nn.Module:
    return nn.ReLU(inplace=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swish", "not known; expected one of silu, gelu, relu, tanh, identity"),
        ("no_such_module:Thing", "cannot be made: ModuleNotFoundError"),
        ("torch.nn:Linear", "cannot be made: TypeError"),
        ("math:tau", "cannot be made: TypeError"),
        ("builtins:list", "makes a list, expected a torch.nn.Module"),
        ("tests.test_checkpoint:in_place", "works in place"),
        ("torch.nn:GLU", "fails on a tensor of shape (2, 3)"),
        ("torch.nn:Module", "fails on a tensor of shape (2, 3): NotImplementedError"),
    ],
)
def test_unusable_activations_are_refused(name: str, message: str) -> None:
    with pytest.raises(ActivationError, match=re.escape(message)):
        resolve_activation(name)
