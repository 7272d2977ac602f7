"""Networks that compute gradients in their forward: forces, derivatives of a solution."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import ConversionError, export_module
from kan_model import KAN
from tests.bundles import CLOSE, run_onnx


class Energy(nn.Module):
    """Forces are the negative gradient of a learned energy."""

    def __init__(self, form: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.kan, self.form = KAN([3, 4, 1]), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.kan, x)


def by_autograd(kan: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.enable_grad():
        x = x.requires_grad_()
        energy = kan(x).squeeze(-1)
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return {"energy": energy, "forces": -gradient}


def without_enabling(kan: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x.requires_grad_()
    energy = kan(x).squeeze(-1)
    return {"energy": energy, "forces": -torch.autograd.grad(energy.sum(), x)[0]}


def by_func(kan: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"forces": -torch.func.grad(lambda v: kan(v).sum())(x), "energy": kan(x).squeeze(-1)}


def by_vmap(kan: nn.Module, x: Tensor) -> Tensor:
    gradient: Tensor = torch.func.vmap(torch.func.grad(lambda v: kan(v[None]).sum()))(x)
    return gradient


def differences(kan: nn.Module, x: Tensor) -> Tensor:
    """Central differences in float64: the oracle."""
    step = 1e-6
    columns = []
    with torch.no_grad():
        for shift in torch.eye(3, dtype=torch.float64) * step:
            columns.append((kan(x + shift) - kan(x - shift))[:, 0] / (2 * step))
    return torch.stack(columns, dim=1)


@pytest.mark.filterwarnings("ignore:the network (computes gradients|has no KANLinear)")
@pytest.mark.parametrize("form", [by_autograd, without_enabling, by_func])
def test_gradients_are_exported_for_any_number_of_rows(tmp_path: Path, form: Any) -> None:
    torch.manual_seed(0)
    network = Energy(form)
    manifest = export_module(network, name="m", output=tmp_path, input_shape=3)
    assert {spec.name: spec.shape for spec in manifest.outputs} == {
        "energy": (-1,),
        "forces": (-1, 3),
    }
    x = np.random.default_rng(0).uniform(-0.9, 0.9, (7, 3)).astype(np.float32)
    names = [spec.name for spec in manifest.outputs]
    found = dict(zip(names, run_onnx(tmp_path / "m" / "1", x), strict=True))
    kan = network.kan.double()
    rows = torch.from_numpy(x).double()
    np.testing.assert_allclose(found["energy"], kan(rows)[:, 0].detach(), **CLOSE)
    np.testing.assert_allclose(found["forces"], -differences(kan, rows), **CLOSE)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.filterwarnings("ignore:the network has no KANLinear")
def test_gradients_row_by_row_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(ConversionError, match=r"all rows at once in place of torch\.func\.vmap"),
        pytest.warns(UserWarning, match="computes gradients in its forward: kan.layers.0"),
    ):
        export_module(Energy(by_vmap), name="m", output=tmp_path / "models", input_shape=3)
    assert not (tmp_path / "models").exists()
