"""Whole pickled modules, and what pickles do that is none: nothing of them runs."""

import functools
import pathlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export import export_checkpoint
from kan_model import ActivationError, CheckpointError, load_checkpoint
from kan_model.checkpoint import read_checkpoint
from tests import zoo
from tests.conftest import GOLDENS
from tests.states import assert_same, network_of, saved


@pytest.fixture
def network() -> zoo.KAN:
    torch.manual_seed(0)
    return zoo.KAN([3, 4, 2]).eval()


@pytest.mark.parametrize("module", ["efficient_kan.kan", "kan", "__main__", "a.vendored.copy"])
def test_a_pickled_module_is_read_wherever_its_class_was_defined(
    tmp_path: Path, module: str
) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([3, 4, 2], base_activation=nn.GELU)
    with zoo.vendored(module):
        path = saved(tmp_path, network)
    if module != "__main__":
        assert module not in sys.modules
    assert_same(path, network)  # with its activation, which no one has named
    if module != "__main__":
        assert module not in sys.modules, "something was imported"


def test_upstreams_own_pickle_gives_upstreams_numbers() -> None:
    """`torch.save(model)` of efficient_kan.kan.KAN, which cannot be imported here."""
    network = load_checkpoint(GOLDENS / "pickled_module_4x6x2.pt")
    with np.load(GOLDENS / "pickled_module_4x6x2.npz") as archive:
        x, y64 = archive["x"], archive["y64"]
    with torch.no_grad():
        y = network(torch.from_numpy(x)).numpy()
    # The design's tolerance, doubled: eager float32 itself is what is compared.
    assert (np.abs(y - y64) <= 2e-5 * np.maximum(1, np.abs(y64))).all()


@pytest.mark.parametrize(
    "activation",
    [
        nn.SiLU,
        nn.GELU,
        functools.partial(nn.GELU, approximate="tanh"),
        functools.partial(nn.LeakyReLU, negative_slope=0.3),
        functools.partial(nn.ELU, 2),
        functools.partial(nn.PReLU, init=0.7),
        nn.Identity,
        lambda: torch.nn.functional.silu,
    ],
    ids=[
        "silu",
        "gelu",
        "gelu tanh",
        "leaky",
        "elu of an integer",
        "prelu",
        "identity",
        "function",
    ],
)
def test_a_pickled_modules_activation_is_known(tmp_path: Path, activation: Any) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([3, 4, 2], base_activation=activation)
    assert_same(saved(tmp_path, network), network)


class OwnActivation(nn.Module):
    """An activation of somebody's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


def test_an_activation_that_is_not_torchs_must_be_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([3, 4, 2], base_activation=OwnActivation)
    path = saved(tmp_path, network)
    with pytest.raises(
        ActivationError,
        match=r"is tests\.test_pickles\.OwnActivation, which cannot be made again.*name",
    ):
        load_checkpoint(path)
    assert_same(path, network, base_activation=OwnActivation)


def test_an_activation_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, zoo.KAN([3, 2], base_activation=nn.GELU))
    with pytest.raises(ActivationError, match=r"file says GELU.*but SiLU\(\) was asked for"):
        load_checkpoint(path, nn.SiLU)
    load_checkpoint(path, nn.GELU)


def test_what_stands_around_a_pickled_kan_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path, zoo.flattening_net())
    with pytest.warns(UserWarning, match=r"a pickled tests\.zoo\.Flattening.*KAN ALONE"):
        manifest = export_checkpoint(path, output=tmp_path / "models")
    assert manifest.inputs[0].shape == (-1, 12)


def hook(*_: Any) -> None:
    """A hook that changes nothing."""


def with_a_hook(network: zoo.KAN) -> None:
    network.layers[0].register_forward_hook(hook)


def with_a_forward(network: zoo.KAN) -> None:
    network.forward = hook  # type: ignore[method-assign,assignment]


def with_a_softmax(network: zoo.KAN) -> None:
    network.out = nn.Softmax(-1)


def with_an_activation_after(network: zoo.KAN) -> None:
    network.layers[1].after = nn.ReLU()


def with_a_norm(network: zoo.KAN) -> None:
    network.layers[0].norm = nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_a_hook, r"layers\.0 has hooks"),
        (with_a_forward, r"the module itself has a forward of its own"),
        (with_a_softmax, r"the module itself has more than its layers \(out\)"),
        (with_an_activation_after, r"layers\.1 has more than its layers \(after\)"),
        (with_a_norm, r"unexpected tensors: layers\.0\.norm\.weight"),
    ],
)
def test_a_pickled_kan_that_does_more_than_its_tensors_say_is_refused(
    tmp_path: Path, network: zoo.KAN, change: Callable[[zoo.KAN], None], message: str
) -> None:
    change(network)
    path = saved(tmp_path, network)
    for prefix in (None, ""):
        with pytest.raises(CheckpointError, match=f"{message}.*--model"):
            load_checkpoint(path, prefix=prefix)


def test_a_scaler_that_is_switched_off_is_not_applied(tmp_path: Path, network: zoo.KAN) -> None:
    network.layers[0].enable_standalone_scale_spline = False
    assert_same(saved(tmp_path, network), network)


def test_a_layer_under_another_name_keeps_its_activation_and_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([3, 4, 2], layer=zoo.GuardedKANLinear, base_activation=nn.GELU)
    path = saved(tmp_path, network)
    assert_same(path, network)
    with pytest.warns(UserWarning, match=r"a pickled tests\.zoo\.GuardedKANLinear"):
        export_checkpoint(path, output=tmp_path / "models")


class Call:
    """Pickled as a call of a function with a path, which it makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __call__(self) -> None:
        """Pickles may call what calls give; Python wants to see that it can be called."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


MALICIOUS: dict[str, Callable[[Path], Any]] = {
    "os.mkdir": lambda trace: Call(__import__("os").mkdir, str(trace)),
    "exec": lambda trace: Call(exec, f"import os; os.mkdir({str(trace)!r})"),
    "subprocess": lambda trace: Call(subprocess.check_call, ["mkdir", str(trace)]),
    "a method": lambda trace: Call(Call(getattr, pathlib.Path, "mkdir"), trace),
    "nested": lambda trace: Call(eval, "pathlib.Path", {"x": Call(exec, "1")}),
}


@pytest.mark.parametrize("attack", MALICIOUS)
@pytest.mark.parametrize("place", ["alone", "beside", "in the optimizer", "in a module"])
def test_a_malicious_pickle_is_refused_and_leaves_no_trace(
    tmp_path: Path, network: zoo.KAN, attack: str, place: str
) -> None:
    payload = MALICIOUS[attack](tmp_path / "trace")
    content: Any = {
        "alone": payload,
        "beside": dict(network.state_dict()) | {"payload": payload},
        "in the optimizer": {"model": network.state_dict(), "optimizer": {"state": [payload]}},
        "in a module": network,
    }[place]
    if place == "in a module":
        network.payload = payload
    path = saved(tmp_path, content)
    with pytest.raises(CheckpointError, match=r"so it is not opened; re-save.*--trust-pickle"):
        load_checkpoint(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_the_attacks_are_real(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(MALICIOUS["os.mkdir"](trace)))
    assert trace.exists()


def test_a_trusted_pickle_is_opened_by_its_own_code(tmp_path: Path) -> None:
    network = zoo.KAN([3, 4, 2], base_activation=nn.GELU)
    path = saved(tmp_path, {"model": network, "note": Call(eval, "1 + 1")})
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        read_checkpoint(path)
    checkpoint = read_checkpoint(path, trust_pickle=True)
    x = torch.linspace(-3, 3, 60).reshape(20, 3)
    found = checkpoint.build_kan(checkpoint.find_kan(), None)(x)
    torch.testing.assert_close(found, network(x), rtol=1e-5, atol=1e-6)


def test_a_trusted_pickle_that_ends_the_process_does_not(tmp_path: Path) -> None:
    path = saved(tmp_path, Call(sys.exit, 0))
    with pytest.raises(CheckpointError, match="its own code failed: SystemExit"):
        read_checkpoint(path, trust_pickle=True)


def test_a_trusted_module_is_exported_as_it_is(tmp_path: Path) -> None:
    network = zoo.clamped_net()
    path = saved(tmp_path, network)
    with pytest.raises(CheckpointError, match="--trust-pickle takes the pickled module itself"):
        export_checkpoint(path, output=tmp_path / "models", input_shape="3,8,8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manifest = export_checkpoint(
            path, output=tmp_path / "models", trust_pickle=True, input_shape="3,8,8"
        )
    messages = [str(warning.message) for warning in caught]
    assert any("the code in" in m and "was RUN" in m for m in messages)
    assert any(
        "fc1 holds what a KANLinear holds, but computes something else" in m for m in messages
    )
    assert manifest.layers == ()


def test_a_pickled_module_with_a_hook_is_exported_by_each_remedy(
    tmp_path: Path, network: zoo.KAN
) -> None:
    with_a_hook(network)
    path = saved(tmp_path, network)
    with pytest.raises(CheckpointError, match=r"layers\.0 has hooks.*--model.*--trust-pickle"):
        export_checkpoint(path, output=tmp_path)
    with pytest.warns(UserWarning, match="was RUN"):
        trusted = export_checkpoint(path, output=tmp_path, trust_pickle=True, input_shape="3")
    given = export_checkpoint(
        path, output=tmp_path, model=lambda: zoo.KAN([3, 4, 2]), input_shape="3"
    )
    for manifest in (trusted, given):
        assert [layer.name for layer in manifest.layers] == ["layers.0", "layers.1"]


def test_a_trusted_module_in_a_trainers_dict_is_taken(tmp_path: Path) -> None:
    network = zoo.clamped_net().eval()
    x = torch.randn(2, 3, 8, 8)
    content: dict[str, Any] = {"epoch": 3, "model": network, "criterion": nn.MSELoss()}
    path = saved(tmp_path, content)
    with pytest.raises(CheckpointError, match="--trust-pickle takes the pickled module itself"):
        network_of(path)
    found, _ = network_of(path, trust_pickle=True)
    assert torch.equal(found(x), network(x))
    other = zoo.conv_net().eval()
    path = saved(tmp_path, content | {"ema": other})
    found, _ = network_of(path, trust_pickle=True, prefix="ema")
    assert torch.equal(found(x), other(x))


def test_a_trusted_module_that_does_more_than_its_tensors_say_is_not_taken_for_them(
    tmp_path: Path, network: zoo.KAN
) -> None:
    with_a_hook(network)
    content = {"a": network, "b": zoo.KAN([3, 2], base_activation=nn.GELU)}
    path = saved(tmp_path, {"inside": content})
    for prefix, message in (("inside.a", r"layers\.0 has hooks"), (None, "holds 2 KANs")):
        with pytest.raises(CheckpointError, match=message):
            network_of(path, trust_pickle=True, prefix=prefix)
    found, _ = network_of(path, trust_pickle=True, prefix="inside.b")
    assert isinstance(found.layers[0].base_activation, nn.GELU)  # type: ignore[index,union-attr]


def test_a_module_that_holds_itself_is_refused(tmp_path: Path, network: zoo.KAN) -> None:
    network._modules["loop"] = network
    with pytest.raises(CheckpointError, match="more than 100000 modules"):
        load_checkpoint(saved(tmp_path, network))


@pytest.fixture
def numpy_allowed() -> Iterator[None]:
    before = torch.serialization.get_safe_globals()
    scalar: Any = type(np.float64(0.5)).__reduce__(np.float64(0.5))[0]
    torch.serialization.add_safe_globals([scalar, np.dtype, np.dtypes.Float64DType])
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.usefixtures("numpy_allowed")
def test_what_other_code_has_allowed_torch_to_load_changes_nothing(tmp_path: Path) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    network = zoo.KAN([3, 4, 2]).eval()
    content = {"model": network.state_dict(), "accuracy": np.float64(0.5)}
    torch.save(content, tmp_path / "model.pt")
    assert_same(tmp_path / "model.pt", network)
    assert set(torch.serialization.get_safe_globals()) == allowed
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"from before 1\.6, so it is not opened"):
        load_checkpoint(tmp_path / "old.pt")
    assert set(torch.serialization.get_safe_globals()) == allowed
