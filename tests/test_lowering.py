from pathlib import Path

import numpy as np
import torch
from torch import nn

from export.lowering import ExpSiLU, lower
from export.onnx_graph import load_onnx, write_onnx
from kan_model import KAN


def test_silu_keeps_its_relative_precision_in_onnxruntime(tmp_path: Path) -> None:
    """Where onnxruntime's own Sigmoid would lose it: far to the left."""
    path = tmp_path / "silu.onnx"
    write_onnx(ExpSiLU().eval(), 1, path, "silu", {})
    x = np.linspace(-80, 30, 100_001, dtype=np.float32)[:, None]
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(load_onnx(path)(x) - exact) <= 1e-5 * np.abs(exact)).all()
    edges = np.array([[np.nan], [-np.inf], [np.inf], [-1e30], [0.0]], dtype=np.float32)
    expected = nn.functional.silu(torch.from_numpy(edges)).numpy()
    np.testing.assert_array_equal(load_onnx(path)(edges), expected)


def test_lowering_computes_the_same_and_leaves_the_network_alone() -> None:
    network = KAN([3, 4, 2]).double()
    x = torch.randn(50, 3).double() * 3
    before = network(x)
    lowered = lower(network)
    torch.testing.assert_close(lowered(x.float()).double(), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(network(x), before)
    assert isinstance(network.layers[0].base_activation, nn.SiLU)


def test_other_activations_are_left_as_they_are() -> None:
    lowered = lower(KAN([2, 1], base_activation=nn.GELU))
    assert isinstance(lowered.layers[0].base_activation, nn.GELU)
