"""A user's own network: built by a function, with the weights of a file in it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import (
    NetworkError,
    export_checkpoint,
)
from tests import zoo
from tests.bundles import CLOSE, run_onnx
from tests.conftest import run_export
from tests.states import saved

BAD: dict[str, tuple[list[str], list[str]]] = {
    "factory fails": (
        ["--model", "tests.zoo:failing_net", "--input-shape", "3,8,8"],
        ["the factory fails: RuntimeError: no such dataset (zoo.py, line"],
    ),
    "factory is missing": (
        ["--model", "tests.zoo:nothing", "--input-shape", "3,8,8"],
        ["--model tests.zoo:nothing: cannot be imported: AttributeError"],
    ),
    "module is missing": (
        ["--model", "no.such:thing", "--input-shape", "3,8,8"],
        ["--model no.such:thing: cannot be imported: ModuleNotFoundError: No module named 'no'"],
    ),
    "no colon": (["--model", "tests.zoo"], ["expected package.module:factory"]),
    "makes no module": (
        ["--model", "tests.zoo:NO_NETWORK", "--input-shape", "3"],
        ["expected a torch.nn.Module, found a dict"],
    ),
    "other keys": (
        ["--model", "tests.zoo:attention_net", "--input-shape", "3,8,8"],
        [
            "missing in the file: embedding.weight",
            "unexpected in the file: features.0.weight",
        ],
    ),
    "no shape": (
        ["--model", "tests.zoo:conv_net"],
        ["what the network takes is not in the file", "--input-shape"],
    ),
    "shape does not fit": (
        ["--model", "tests.zoo:conv_net", "--input-shape", "3,9,40"],
        ["the network does not take input FP32 [batch, 3, 9, 40]", "--input-shape"],
    ),
    "batch in the shape": (
        ["--model", "tests.zoo:conv_net", "--input-shape", "1,3,8,8"],
        ["the network does not take input FP32 [batch, 1, 3, 8, 8]", "without the batch"],
    ),
    "samples are missing": (
        ["--model", "tests.zoo:conv_net", "--samples", "none.npy"],
        ["samples 'none.npy': cannot be read: No such file"],
    ),
    "an activation beside a network": (
        ["--model", "tests.zoo:conv_net", "--input-shape", "3,8,8", "--activation", "silu"],
        ["--activation: the network says itself"],
    ),
    "no such prefix": (
        ["--model", "tests.zoo:conv_net", "--input-shape", "3,8,8", "--prefix", "ema."],
        ["no tensors behind the prefix 'ema.'; found features.0.weight", "leave --prefix out"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_gives_one_message_and_writes_nothing(tmp_path: Path, case: str) -> None:
    flags, messages = BAD[case]
    path = saved(tmp_path, zoo.conv_net().state_dict())
    done = run_export(path, *flags, "--output", tmp_path / "models")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("error: ") == 1
    for message in messages:
        assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_a_shape_of_one_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = zoo.conv_net().state_dict() | {"fc2.base_weight": torch.zeros(3, 6)}
    with pytest.raises(
        NetworkError, match=r"fc2\.base_weight: expected shape \(2, 6\) as in the .* \(3, 6\)"
    ):
        export_checkpoint(
            saved(tmp_path, state), output=tmp_path, model=zoo.conv_net, input_shape=(3, 8, 8)
        )


def test_weights_that_are_there_twice_must_be_chosen(tmp_path: Path) -> None:
    torch.manual_seed(5)
    ema = zoo.Flattening()
    content = {"model": zoo.flattening_net().state_dict(), "ema": ema.state_dict()}
    path = saved(tmp_path, content)
    options: dict[str, Any] = {"model": zoo.flattening_net, "input_shape": (3, 4)}
    with pytest.raises(NetworkError, match=r"2 times, behind the prefixes 'model\.', 'ema\.'"):
        export_checkpoint(path, output=tmp_path / "models", **options)
    export_checkpoint(path, output=tmp_path / "models", prefix="ema", **options)
    x = np.random.default_rng(0).standard_normal((4, 3, 4)).astype(np.float32)
    with torch.no_grad():
        expected = ema(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(
        run_onnx(tmp_path / "models" / "model" / "1", x)[0], expected, **CLOSE
    )


def test_what_the_users_code_prints_is_no_result(tmp_path: Path) -> None:
    path = saved(tmp_path, zoo.conv_net().state_dict())
    flags = ["--model", "tests.zoo:talking_net", "--input-shape", "3,8,8"]
    done = run_export(path, *flags, "--output", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/models/model/1\n"
    assert "a factory may print" in done.stderr


def test_tied_weights_may_be_in_the_file_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.k = zoo.KANLinear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.k(self.b(self.a(x)))
            return y

    torch.manual_seed(0)
    state = Tied().state_dict()
    del state["b.weight"]
    export_checkpoint(saved(tmp_path, state), output=tmp_path, model=Tied, input_shape=3)
