"""Files with fewer bits, against the function that rounded weights compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from export import ParityError, export_module
from export.conversion import onnx_graph
from export.conversion import precision as precisions
from export.conversion.lowering import choose_forms, lower_layers
from export.conversion.simulation import simulate
from export.network import describe_network
from kan_bundle.manifest import Precision
from kan_model import KAN
from tests import zoo
from tests.oracle import basis_function

REDUCED: list[Precision] = ["fp16", "bf16", "int8"]


def adapted() -> KAN:
    kan = KAN([5, 6, 3])
    kan.layers[0].update_grid(torch.randn(200, 5))
    return kan


@pytest.mark.parametrize("make", [lambda: KAN([6, 8, 3]), adapted, zoo.conv_net])
@pytest.mark.parametrize("precision", REDUCED)
def test_the_file_is_as_close_to_the_simulation_as_an_exact_one_to_its_network(
    tmp_path: Path, precision: Precision, make: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    network = make()
    shape = None if isinstance(network, KAN) else (3, 8, 8)
    manifest = export_module(
        network, name="m", output=tmp_path, precision=precision, input_shape=shape
    )
    assert {record.tolerance for record in manifest.parity} == {1e-5}
    assert manifest.approximation is not None
    assert manifest.approximation.largest > 0


def test_the_simulation_of_int8_is_the_rounded_sum() -> None:
    """Against a sum over edges in plain numpy, of the integers that the file holds."""
    torch.manual_seed(0)
    network = describe_network(KAN([4, 3]).eval(), None)
    lowered = lower_layers(network, choose_forms(network), "int8")
    (form,) = lowered.values()
    product = form.product
    assert isinstance(product, precisions.Int8Product)
    x = np.random.default_rng(0).uniform(-2, 2, (40, 4))
    knots = network.layers["layers.0"].grid.double().numpy()
    values = np.array(
        [
            [[basis_function(row[i], knots[i], n, 3) for n in range(8)] for i in range(4)]
            for row in x
        ]
    )
    levels = np.round(values / (product.step * form.basis.scale))  # (rows, in, n)
    spline = np.empty((8, 4, 3))
    spline[form.order] = product.spline.double().numpy().reshape(8, 4, 3)
    expected = np.einsum("rin,nio->ro", levels, spline) * product.spline_scale.double().numpy()
    base = product.base.double().numpy() * product.base_scale.double().numpy()
    expected += (x / (1 + np.exp(-x))) @ base
    simulated = simulate(network, lowered).call.double()
    with torch.no_grad():
        found = simulated(torch.from_numpy(x))[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def change_weights(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    """Let a file be written with other values of one tensor."""

    def write(call: Any, *arguments: Any, **options: Any) -> frozenset[str]:
        fused = onnx_graph.write_onnx(call, *arguments, **options)
        path = next(a for a in arguments if isinstance(a, Path))
        model = onnx.load(path)
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        values = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        onnx.save(model, path)
        return fused

    monkeypatch.setattr("export.pipeline.write_onnx", write)


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("part", ["spline_scale", "base_scale"])
def test_a_scale_that_is_off_by_one_level_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, part: str
) -> None:
    torch.manual_seed(0)
    change_weights(
        monkeypatch, f"layers.0.product.{part}", lambda v: (v * (128 / 127)).astype(v.dtype)
    )
    with pytest.raises(ParityError, match="onnxruntime cpu does not compute"):
        export_module(
            KAN([8, 6, 3]),
            name="m",
            output=tmp_path / "models",
            precision=precision,
            torchscript="off",
        )
    assert not (tmp_path / "models").exists()


def test_an_integer_that_is_off_by_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(values: NDArray[Any]) -> NDArray[Any]:
        values[20, 1] += 1 if values[20, 1] < 100 else -1
        return values

    torch.manual_seed(0)
    change_weights(monkeypatch, "layers.0.product.spline", change)
    with pytest.raises(ParityError, match="does not compute"):
        export_module(
            KAN([8, 6, 3]),
            name="m",
            output=tmp_path / "models",
            precision="int8",
            torchscript="off",
        )


def test_weights_that_are_not_rounded_to_the_nearest_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantisation that is wrong itself would agree with a simulation made of it."""
    rounded = precisions._rounded
    monkeypatch.setattr(precisions, "_rounded", lambda w, s: rounded(w, s * (128 / 127)))
    with pytest.raises(ParityError, match="not rounded to the nearest"):
        export_module(KAN([8, 6, 3]), name="m", output=tmp_path / "models", precision="int8")


def test_a_scale_in_which_nothing_is_left_is_too_coarse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.pipeline.COARSEST", {"int8": 1e-6})
    with pytest.raises(ParityError, match="int8 is too coarse for this model"):
        export_module(KAN([8, 6, 3]), name="m", output=tmp_path / "models", precision="int8")
    assert not (tmp_path / "models").exists()
