"""The files in which people have their KANs: dicts around dicts, prefixes, safetensors, pickles."""

import argparse
import enum
import functools
import pathlib
import pickle
import subprocess
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
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
    "objects": lambda n: {
        "model": n.state_dict(),
        "mode": Mode.BEST,
        "options": Options(depth=3),
        "scale": functools.partial(torch.mul, 2),
        "more": [frozenset({1}), slice(1), types.SimpleNamespace(a=1), deque([1])],
    },
    "kinds of dict": lambda n: Settings(model=Settings(n.state_dict()), more=Several([1, 2])),
    "in an object": lambda n: {"trainer": Options(depth=n.state_dict())},
    "layers compiled one by one": lambda n: {
        key.replace("layers.0.", "layers.0._orig_mod."): value
        for key, value in n.state_dict().items()
    },
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


class Mode(enum.Enum):
    """As in a configuration."""

    BEST = "best"


@dataclass
class Options:
    """As in a configuration."""

    depth: Any


class Settings(dict[str, Any]):
    """A dict of somebody's own, whose items are attributes, too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.__dict__.update(self)


class Several(list[Any]):
    """A list of somebody's own."""


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
        match=r"is tests\.test_containers\.OwnActivation, which cannot be made again.*name",
    ):
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


@pytest.mark.parametrize("name", ["gelu", "GELU", "torch.nn.GELU", "nn.GELU", "torch.nn:GELU"])
def test_safetensors_metadata_names_the_activation_in_any_spelling(
    tmp_path: Path, name: str
) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([3, 4, 2], base_activation=nn.GELU)
    save_file(network.state_dict(), tmp_path / "m.safetensors", {"activation": name})
    assert_same(tmp_path / "m.safetensors", network)


@pytest.mark.parametrize("name", ["swish2", "os:system", "Linear", "Threshold", "\x1b[2J"])
def test_safetensors_metadata_cannot_name_code(tmp_path: Path, network: zoo.KAN, name: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path, {"activation": name})
    with pytest.raises(ActivationError, match="cannot be made again from the file; name it with"):
        load_checkpoint(path)
    assert_same(path, network, base_activation=nn.SiLU)


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


def test_other_networks_in_the_file_are_told(tmp_path: Path, network: zoo.KAN) -> None:
    path = saved(
        tmp_path,
        {
            "encoder": nn.Linear(2, 3).state_dict(),
            "head": network.state_dict(),
            "optim": {"momentum": torch.zeros(2, 2)},
        },
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_checkpoint(path, output=tmp_path / "models", activation="silu")
    (message,) = [str(warning.message) for warning in caught]
    assert "also holds tensors at encoder.; the KAN ALONE is exported" in message


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


def test_a_module_that_holds_itself_is_refused(tmp_path: Path, network: zoo.KAN) -> None:
    network._modules["loop"] = network
    with pytest.raises(CheckpointError, match="more than 100000 modules"):
        load_checkpoint(saved(tmp_path, network))


def test_objects_that_hold_each_other_many_times_are_looked_at_once(
    tmp_path: Path, network: zoo.KAN
) -> None:
    nested: Any = [1]
    for _ in range(50):
        nested = [nested] * 10
    endless: dict[str, Any] = {"model": network.state_dict(), "nested": nested}
    endless["again"] = endless
    assert_same(saved(tmp_path, endless), network)
    shared: nn.Module = nn.Linear(1, 1)
    for _ in range(30):
        shared = nn.Sequential(shared, shared)
    with pytest.raises(CheckpointError, match="more than 100000 modules"):
        load_checkpoint(saved(tmp_path, shared))


def test_what_a_pickle_hangs_on_dicts_and_tensors_is_not_used(
    tmp_path: Path, network: zoo.KAN
) -> None:
    state = OrderedDict(network.state_dict())
    state.keys = state.values = 5  # type: ignore[method-assign,assignment]
    parameter = nn.Parameter(state["layers.0.base_weight"])
    parameter.float = parameter.to = parameter.dim = 5  # type: ignore[method-assign,assignment]
    state["layers.0.base_weight"] = parameter
    assert_same(saved(tmp_path, state), network)


def test_a_flipped_bit_is_noticed(tmp_path: Path, network: zoo.KAN) -> None:
    path = saved(tmp_path, network.state_dict())
    content = bytearray(path.read_bytes())
    weights = state_bytes(network)
    content[content.index(weights) + 3] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not agree with its checksum"):
        load_checkpoint(path)


def state_bytes(network: zoo.KAN) -> bytes:
    return bytes(network.state_dict()["layers.0.spline_weight"].numpy().tobytes())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pickle_protocol": 4}, r"pickled with another protocol than torch\.save's own"),
        ({"_use_new_zipfile_serialization": False}, r"torch's format from before 1\.6"),
    ],
)
def test_forms_that_cannot_be_read_safely_are_named(
    tmp_path: Path, network: zoo.KAN, options: dict[str, Any], message: str
) -> None:
    torch.save(network, tmp_path / "model.pt", **options)
    with pytest.raises(CheckpointError, match=f"{message}.*re-save"):
        load_checkpoint(tmp_path / "model.pt")


def test_keras_files_are_refused_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    (tmp_path / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    for name in ("model.keras", "model.h5"):
        with pytest.raises(CheckpointError, match="Keras ports of KAN cannot be exported"):
            load_checkpoint(tmp_path / name)


def test_names_of_a_network_may_resemble_other_families(tmp_path: Path, network: zoo.KAN) -> None:
    state = prefixed(network.state_dict(), "head.") | {
        "body.prelu.weight": torch.zeros(1),
        "svm.rbf.grid": torch.zeros(3),
    }
    with pytest.raises(CheckpointError, match=r"more than the KAN at 'head\.'.*--model"):
        load_checkpoint(saved(tmp_path, state))
