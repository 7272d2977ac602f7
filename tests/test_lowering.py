from pathlib import Path

import numpy as np
import torch
from torch import nn

from export.lowering import ExpSiLU, LoweredKANLinear, lowered
from export.network import Call, describe_network
from export.onnx_graph import load_onnx, write_onnx
from kan_bundle.manifest import TensorSpec
from kan_model import KAN


def test_silu_keeps_its_relative_precision_in_onnxruntime(tmp_path: Path) -> None:
    """Where onnxruntime's own Sigmoid would lose it: far to the left."""
    path = tmp_path / "silu.onnx"
    inputs, outputs = (TensorSpec("x", "FP32", (-1, 1)),), (TensorSpec("y", "FP32", (-1, 1)),)
    call = Call(ExpSiLU(), ["x"]).eval()
    write_onnx(call, (torch.zeros(2, 1),), inputs, outputs, path, "silu", {})
    run = load_onnx(path)
    x = np.linspace(-80, 30, 100_001, dtype=np.float32)[:, None]
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(run([x])[0] - exact) <= 1e-5 * np.abs(exact)).all()
    edges = np.array([[np.nan], [-np.inf], [np.inf], [-1e30], [0.0]], dtype=np.float32)
    expected = nn.functional.silu(torch.from_numpy(edges)).numpy()
    np.testing.assert_array_equal(run([edges])[0], expected)


def test_lowering_computes_the_same_and_leaves_the_network_as_it_was() -> None:
    kan = KAN([3, 4, 2])
    network = describe_network(kan.double(), None)
    x = torch.randn(50, 3).double() * 3
    before, layers = kan(x), list(kan.layers)
    with lowered(network) as call:
        assert isinstance(call.module.layers[0], LoweredKANLinear)  # type: ignore[index]
        torch.testing.assert_close(call(x.float())[0].double(), before, rtol=1e-5, atol=1e-6)
    assert list(kan.layers) == layers
    assert torch.equal(kan(x), before)


def test_only_silu_is_written_in_another_form() -> None:
    for activation, form in ((nn.GELU, nn.GELU), (nn.SiLU, ExpSiLU)):
        layer = LoweredKANLinear(KAN([2, 1], base_activation=activation).layers[0])
        assert isinstance(layer.base_activation, form)


def test_a_lowered_layer_takes_any_leading_dimensions() -> None:
    layer = KAN([3, 2]).layers[0]
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(LoweredKANLinear(layer)(x), layer(x))
