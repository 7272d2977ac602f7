"""Importances by sums over each interval, against the definition edge by edge."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from export.curves import (
    importance,
)
from export.moments import Moments
from kan_model import KANLinear
from tests.conftest import ROOT


def scipy_basis(x: torch.Tensor, knots: torch.Tensor, order: int) -> torch.Tensor:
    """Every basis function at every point, (points, functions), 0 where its support ends."""
    found = []
    for i in range(len(knots) - order - 1):
        own = knots[i : i + order + 2].numpy()
        within = (own[0] <= x.numpy()) & (x.numpy() < own[-1])
        found.append(np.where(within, BSpline.basis_element(own)(x.numpy()), 0.0))
    return torch.from_numpy(np.stack(found, axis=1))


def dense_importance(layer: KANLinear, x: torch.Tensor) -> torch.Tensor:
    """The definition: every edge at every point, shape (rows, in) to (out, in)."""
    weight = layer.spline_weight.detach().double()
    if layer.enable_standalone_scale_spline:
        weight = weight * layer.spline_scaler.detach().double()[..., None]
    found = torch.empty(layer.base_weight.shape, dtype=torch.float64)
    for i in range(layer.in_features):
        own = x[x[:, i].isfinite(), i].double()
        basis = scipy_basis(own, layer.grid[i].double(), layer.spline_order)
        base = layer.base_activation(own)[:, None] * layer.base_weight[:, i].detach().double()
        found[:, i] = (base + basis @ weight[:, i].T).std(dim=0, correction=0)
    return found


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("grid_size", [1, 2, 7, 40])
@pytest.mark.parametrize("scaler", [True, False])
@torch.no_grad()
def test_a_band_of_products_gives_every_edges_deviation(
    order: int, grid_size: int, scaler: bool
) -> None:
    torch.manual_seed(order)
    layer = KANLinear(
        4, 3, grid_size=grid_size, spline_order=order, enable_standalone_scale_spline=scaler
    )
    layer.spline_weight.normal_()
    x = torch.randn(300, 4) * 2  # many outside of the grid, and beyond its margins
    x[:, 1] *= 1e-3
    x[5, 2], x[6, 2], x[7, 3] = math.nan, math.inf, 1e30
    x[8:20, 3] = layer.grid[3, 0]  # on knots
    x[20:30, 3] = layer.grid[3, -1]
    torch.testing.assert_close(
        importance(layer, x), dense_importance(layer, x), rtol=1e-9, atol=1e-12
    )
    moved = layer.grid + 0.3 * torch.rand(4, 1)
    layer.grid.copy_(moved)
    count = max(64, 4 * grid_size)
    low, high = moved[:, order].double(), moved[:, order + grid_size].double()
    over = low + (high - low) * (torch.arange(count).double()[:, None] + 0.5) / count
    torch.testing.assert_close(
        importance(layer), dense_importance(layer, over), rtol=1e-9, atol=1e-12
    )


@torch.no_grad()
def test_an_input_that_never_varies_gives_its_edges_no_importance_at_all() -> None:
    torch.manual_seed(0)
    layer = KANLinear(3, 2)
    x = torch.rand(100, 3)
    x[:, 1] = 0.1234
    found = importance(layer, x)
    assert (found[:, 1] == 0).all()
    assert (found[:, [0, 2]] > 1e-3).all()


@torch.no_grad()
def test_a_constant_spline_has_no_importance_however_high_it_lies() -> None:
    torch.manual_seed(0)
    layer = KANLinear(2, 2, grid_size=20)
    layer.base_weight[0, 0] = 0
    layer.spline_weight[0, 0] = 1e6
    assert importance(layer)[0, 0] < 1e-8
    assert importance(layer, torch.rand(50, 2))[0, 0] < 1e-8


@pytest.mark.parametrize("budget", [200, 20, 1])
def test_large_layers_are_measured_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    torch.manual_seed(0)
    layer = KANLinear(7, 5)
    x = torch.randn(30, 7)
    whole = importance(layer), importance(layer, x)
    most: list[int] = []
    measured = Moments.deviation

    def note(own: Moments, base: torch.Tensor, spline: torch.Tensor) -> torch.Tensor:
        most.append(spline.numel())
        return measured(own, base, spline)

    monkeypatch.setattr(Moments, "deviation", note)
    monkeypatch.setattr("export.curves._BUDGET", budget)
    torch.testing.assert_close(importance(layer), whole[0])
    torch.testing.assert_close(importance(layer, x), whole[1])
    assert max(most) <= max(budget, layer.spline_weight.shape[2])
    assert sum(most) == 2 * layer.spline_weight.numel()


def test_the_memory_of_a_fine_grid_grows_with_its_intervals_alone() -> None:
    """Functions times functions would be 3.4 GB, and points times functions 13 GB."""
    tracker = (
        "import resource, torch; from kan_model import KANLinear;"
        "from export.curves import importance;"
        "layer = KANLinear(1, 1, grid_size=5, spline_order=3);"
        "layer.grid_size, layer.grid = 20000, torch.arange(-3., 20004.)[None];"
        "layer.spline_weight = torch.nn.Parameter(torch.randn(1, 1, 20003));"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "importance(KANLinear(1, 1)); before = peak(); importance(layer);"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", tracker], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000  # KB
