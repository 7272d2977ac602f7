"""The files in which people have their KANs: dicts around dicts, prefixes, safetensors, pickles."""

import argparse
import functools
import pathlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from export import export_checkpoint
from kan_model import ActivationError, CheckpointError, load_checkpoint
from kan_model.checkpoint import read_checkpoint
from tests import zoo
from tests.conftest import GOLDENS
from tests.states import saved

Content = Callable[[nn.Module], Any]


@pytest.fixture
def network() -> zoo.KAN:
    torch.manual_seed(0)
    return zoo.KAN([3, 4, 2]).eval()


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


def assert_same(path: Path, network: zoo.KAN, **options: Any) -> None:
    x = torch.linspace(-3, 3, 60).reshape(20, 3)
    found = load_checkpoint(path, **options)(x)
    torch.testing.assert_close(found, network(x), rtol=1e-5, atol=1e-6)


CONTAINERS = {
    "bare": lambda n: n.state_dict(),
    "state_dict": lambda n: {"state_dict": n.state_dict(), "epoch": 3},
    "model_state_dict": lambda n: {
        "model_state_dict": n.state_dict(),
        "optimizer_state_dict": trained(n).state_dict(),
        "loss": torch.tensor(0.1),
    },
    "lightning": lambda n: {
        "state_dict": prefixed(n.state_dict(), "model."),
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"activation": nn.SiLU, "root": pathlib.Path("/data")},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)}},
        "optimizer_states": [trained(n).state_dict()],
        "lr_schedulers": [],
    },
    "arguments": lambda n: {"model": n.state_dict(), "args": argparse.Namespace(lr=1e-3)},
    "numpy scalars": lambda n: {"net": n.state_dict(), "best": np.float64(0.9), "n": np.int64(3)},
    "numbers beside the weights": lambda n: dict(n.state_dict()) | {"epoch": 3},
    "module.": lambda n: nn.DataParallel(n).state_dict(),
    "_orig_mod.": lambda n: prefixed(n.state_dict(), "_orig_mod."),
    "module._orig_mod.": lambda n: prefixed(n.state_dict(), "module._orig_mod."),
    "averaged": lambda n: torch.optim.swa_utils.AveragedModel(n).state_dict(),
    "deep": lambda n: {"a": [{"b": ({"weights": prefixed(n.state_dict(), "net.kan.")},)}]},
    "module inside": lambda n: {"model": n, "epoch": 3},
    "whole module": lambda n: n,
    "whole parallel module": nn.DataParallel,
}


def trained(network: zoo.KAN) -> torch.optim.Optimizer:
    """An optimiser whose state holds tensors."""
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.zeros(1, 3)).sum().backward()
    optimiser.step()
    return optimiser


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_kan_is_found_in_every_container(
    tmp_path: Path, network: zoo.KAN, container: str
) -> None:
    path = saved(tmp_path, CONTAINERS[container](network))  # type: ignore[no-untyped-call]
    assert_same(path, network)


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
        functools.partial(nn.PReLU, init=0.7),
        nn.Identity,
        lambda: torch.nn.functional.silu,
    ],
    ids=["silu", "gelu", "gelu tanh", "leaky", "prelu", "identity", "function"],
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
    with pytest.raises(ActivationError, match=r"is a tests\.test_containers\.OwnActivation.*name"):
        load_checkpoint(path)
    assert_same(path, network, base_activation=OwnActivation)


def test_an_activation_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, zoo.KAN([3, 2], base_activation=nn.GELU))
    with pytest.raises(ActivationError, match=r"file says GELU.*but SiLU\(\) was asked for"):
        load_checkpoint(path, nn.SiLU)
    load_checkpoint(path, nn.GELU)


def test_safetensors_are_read_with_their_metadata(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([3, 4, 2], base_activation=nn.Tanh)
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path, {"base_activation": "tanh"})
    assert_same(path, network)
    save_file(prefixed(network.state_dict(), "model."), path)
    assert_same(path, network, base_activation=nn.Tanh)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"base_activation": "swish"}, "in its metadata: activation 'swish' is not known"),
        ({"activation": "os:system"}, "only torch.nn's are taken from a file"),
    ],
)
def test_safetensors_metadata_cannot_name_code(
    tmp_path: Path, network: zoo.KAN, metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path, metadata)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, network: zoo.KAN) -> None:
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load_checkpoint(path)


def test_two_kans_are_told_apart_by_prefix(tmp_path: Path, network: zoo.KAN) -> None:
    other = zoo.KAN([5, 2])
    path = saved(tmp_path, {"model": other.state_dict(), "ema": {"module": network.state_dict()}})
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert "holds 2 KANs: choose one with --prefix" in message
    assert "'ema.module.' (2 layers: 3 x 4, 4 x 2)" in message
    assert "'model.' (1 layer: 5 x 2)" in message
    assert_same(path, network, prefix="ema.module")
    assert_same(path, network, prefix="ema.module.")
    with pytest.raises(CheckpointError, match=r"no KAN has the prefix 'teacher\.'; choose one"):
        load_checkpoint(path, prefix="teacher.")


def test_a_kan_that_is_part_of_a_network_is_not_taken_for_the_whole(
    tmp_path: Path, network: zoo.KAN
) -> None:
    state = prefixed(network.state_dict(), "head.") | {"conv.weight": torch.zeros(2, 2)}
    path = saved(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"unexpected tensors: conv\.weight.*--model.*--pref"):
        load_checkpoint(path)
    assert_same(path, network, prefix="head.")


def test_lone_layers_inside_a_network_are_refused_with_a_remedy(tmp_path: Path) -> None:
    path = saved(tmp_path, zoo.conv_net().state_dict())
    with pytest.raises(CheckpointError, match=r"inside another network, at 'fc1\.', 'fc2\.'.*--mo"):
        load_checkpoint(path)


def test_what_stands_around_a_pickled_kan_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path, zoo.flattening_net())
    with pytest.warns(UserWarning, match=r"a pickled tests\.zoo\.Flattening.*KAN ALONE"):
        manifest = export_checkpoint(path, output=tmp_path / "models")
    assert manifest.inputs[0].shape == (-1, 12)


def test_hooks_in_a_pickle_are_refused(tmp_path: Path, network: zoo.KAN) -> None:
    network.layers[0].register_forward_hook(functools.partial(print))
    with pytest.raises(CheckpointError, match=r"so it is not opened|has hooks at layers\.0"):
        load_checkpoint(saved(tmp_path, network))


def test_efficient_kan_plus_is_taken_while_its_mask_is_unset(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([3, 4, 2], layer=zoo.MaskedKANLinear)
    assert_same(saved(tmp_path, network.state_dict()), network)
    network.layers[1].symbolic_mask[0, 2] = 1
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.symbolic_mask: 1 of 8 edges are symbolic functions"
    ):
        load_checkpoint(saved(tmp_path, network.state_dict()))


class Call:
    """Pickled as a call of a function with a path, which it makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


MALICIOUS: dict[str, Callable[[Path], Any]] = {
    "os.mkdir": lambda trace: Call(__import__("os").mkdir, str(trace)),
    "exec": lambda trace: Call(exec, f"import os; os.mkdir({str(trace)!r})"),
    "subprocess": lambda trace: Call(subprocess.check_call, ["mkdir", str(trace)]),
    "getattr": lambda trace: Call(getattr, pathlib.Path, "mkdir"),
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


def test_a_trusted_pickle_is_opened_by_its_own_code(tmp_path: Path, network: zoo.KAN) -> None:
    path = saved(tmp_path, {"model": network, "note": Call(str.upper, "ran")})
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        read_checkpoint(path)
    states = read_checkpoint(path, trust_pickle=True).states
    assert set(states[0].tensors) == set(network.state_dict())


def test_a_trusted_module_is_exported_as_it_is(tmp_path: Path) -> None:
    network = zoo.clamped_net()
    path = saved(tmp_path, network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manifest = export_checkpoint(
            path, output=tmp_path / "models", trust_pickle=True, input_shape="3,8,8"
        )
    messages = [str(warning.message) for warning in caught]
    assert any("the code in" in m and "is RUN" in m for m in messages)
    assert any(
        "fc1 holds what a KANLinear holds, but computes something else" in m for m in messages
    )
    assert manifest.layers == ()


def test_a_module_that_holds_itself_is_refused(tmp_path: Path, network: zoo.KAN) -> None:
    network._modules["loop"] = network
    with pytest.raises(CheckpointError, match="holds itself"):
        load_checkpoint(saved(tmp_path, network))


def test_dicts_nested_without_end_are_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["again"] = content
    with pytest.raises(CheckpointError, match="nested more than"):
        load_checkpoint(saved(tmp_path, content))
