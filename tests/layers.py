"""KANLinear layers for tests, and ways to run them beside their own: a file, the definition."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export.conversion.onnx_graph import write_onnx
from export.network import Call
from export.runtimes import load_onnx
from kan_model import KANLinear, load_checkpoint, resolve_activation
from tests import oracle
from tests.conftest import Golden

ACTIVATIONS = {"silu": oracle.silu, "gelu": oracle.gelu}


def make_layer(
    order: int = 3, grid_size: int = 5, *, features: int = 4, knots: str = "uniform"
) -> KANLinear:
    """Make a layer with a spline that matters; its knots are uniform, each (step), or adapted."""
    torch.manual_seed(order)
    layer = KANLinear(
        features,
        3,
        grid_size=grid_size,
        spline_order=order,
        grid_eps=1.0 if knots == "steps" else 0.02,
        grid_range=(-1.5, 2.25),
    )
    nn.init.normal_(layer.spline_weight)
    if knots != "uniform":
        layer.update_grid(torch.randn(200, features) * torch.arange(1, features + 1))
    return layer


def answers_of_the_oracle(layer: KANLinear, rows: Tensor) -> np.ndarray:
    state = {f"layers.0.{k}": v.double().numpy() for k, v in layer.state_dict().items()}
    return oracle.kan(state, rows.double().numpy(), oracle.silu)


def write(module: nn.Module, rows: Tensor, folder: Path) -> Callable[[Tensor], np.ndarray]:
    """Write a file, traced with the first rows; returns what runs it."""
    path = folder / "m.onnx"
    write_onnx(Call(module, ["x"]).eval(), (rows[:2],), ["x"], ["y"], path, "m", {})
    session = load_onnx(path)

    def run(x: Tensor) -> np.ndarray:
        found: np.ndarray = session([x.numpy()])[0]
        return found

    return run


def write_and_run(module: nn.Module, rows: Tensor, folder: Path) -> np.ndarray:
    return write(module, rows, folder)(rows)


def golden_layers(golden: Golden) -> list[KANLinear]:
    kan = load_checkpoint(golden.checkpoint, resolve_activation(golden.activation))
    return list(kan.requires_grad_(False).layers)


def phi(
    layer: KANLinear, feature: int, output: int, x: float, activation: str = "silu"
) -> tuple[float, float]:
    """The base and the spline of one edge, by the oracle."""
    knots = layer.grid[feature].double().numpy()
    basis = [
        oracle.basis_function(x, knots, c, layer.spline_order)
        for c in range(layer.spline_weight.shape[2])
    ]
    spline = float(np.dot(layer.spline_weight[output, feature].detach().double().numpy(), basis))
    scaler = float(layer.spline_scaler[output, feature])
    base = float(layer.base_weight[output, feature]) * ACTIVATIONS[activation](x)
    return base, scaler * spline
