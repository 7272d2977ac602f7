"""TorchScript beside ONNX: written where it is right, left out where only it fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import ConversionError, InputError, export_module
from export.runtimes import load_onnx
from kan_bundle.manifest import read_manifest
from kan_model import KAN, KANLinear
from tests.conftest import GOLDENS, run_export


class WithProperty(nn.Module):
    """A property that torch.jit runs, and that has no value yet."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KANLinear(4, 2)

    @property
    def trained_on(self) -> str:
        raise RuntimeError("no data set")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kan(x)
        return y


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2


class WithOwnGradient(nn.Module):
    """A function with a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KANLinear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kan(_Scale.apply(x))  # type: ignore[no-untyped-call]
        return y


class Branching(nn.Module):
    """What computes something else while TorchScript traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KANLinear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        y: Tensor = self.kan(x)
        return y + 1 if tracing else y


@pytest.mark.parametrize("make", [WithProperty, WithOwnGradient, Branching])
def test_a_network_of_which_only_torchscript_fails_is_published(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    network = make().eval()
    with pytest.warns(UserWarning, match="the bundle has no model.ts: "):
        manifest = export_module(network, name="m", output=tmp_path, input_shape=4)
    assert manifest.torchscript_omitted
    folder = tmp_path / "m" / "1"
    assert not (folder / "model.ts").exists()
    assert read_manifest(folder).torchscript_omitted == manifest.torchscript_omitted
    assert "torchscript" not in {record.runtime for record in manifest.parity}
    assert "model.ts" in (folder / "report.html").read_text()
    x = torch.randn(5, 4)
    with torch.no_grad():
        np.testing.assert_allclose(
            load_onnx(folder / "model.onnx")([x.numpy()])[0], network(x).numpy(), atol=1e-6
        )


def test_where_it_is_demanded_its_failure_is_the_refusal(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="cannot be written as TorchScript"):
        export_module(
            WithProperty(), name="m", output=tmp_path / "models", input_shape=4, torchscript="on"
        )
    assert not (tmp_path / "models").exists()


def test_it_can_be_left_out(tmp_path: Path) -> None:
    manifest = export_module(KAN([3, 2]), name="m", output=tmp_path, torchscript="off")
    assert manifest.torchscript_omitted == "--torchscript off"
    assert "model.ts" not in manifest.files


def test_another_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--torchscript: expected auto, on, off, found 'yes'"):
        export_module(
            KAN([3, 2]),
            name="m",
            output=tmp_path,
            torchscript="yes",  # type: ignore[arg-type]
        )
    run = run_export(GOLDENS / "uniform_4x8x3.pt", "--torchscript", "yes")
    assert run.returncode == 2
