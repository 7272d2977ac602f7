"""KANLinear layers for tests, and two ways to run them beside their own."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export.conversion.onnx_graph import load_onnx, write_onnx
from export.network import Call
from kan_model import KANLinear
from tests import oracle


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


def write_and_run(module: nn.Module, rows: Tensor, folder: Path) -> np.ndarray:
    path = folder / "m.onnx"
    write_onnx(Call(module, ["x"]).eval(), (rows[:2],), ["x"], ["y"], path, "m", {})
    found: np.ndarray = load_onnx(path)([rows.numpy()])[0]
    return found
