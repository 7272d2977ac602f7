"""The files in which people have their KANs: dicts around dicts, prefixes, safetensors, pickles."""

import argparse
import enum
import functools
import pathlib
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
from tests import zoo
from tests.states import assert_same, saved

Content = Callable[[nn.Module], Any]


@pytest.fixture
def network() -> zoo.KAN:
    torch.manual_seed(0)
    return zoo.KAN([3, 4, 2]).eval()


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


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
        with pytest.raises(CheckpointError, match="only networks of PyTorch can be exported"):
            load_checkpoint(tmp_path / name)


def test_names_of_a_network_may_resemble_other_families(tmp_path: Path, network: zoo.KAN) -> None:
    state = prefixed(network.state_dict(), "head.") | {
        "body.prelu.weight": torch.zeros(1),
        "svm.rbf.grid": torch.zeros(3),
    }
    with pytest.raises(CheckpointError, match=r"more than the KAN at 'head\.'.*--model"):
        load_checkpoint(saved(tmp_path, state))
