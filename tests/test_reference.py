"""What a network should answer, and how far from it is still right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kan_model
from export import (
    InputError,
    ParityError,
    export_module,
)
from export.conversion import onnx_graph
from export.conversion.lowering import LoweredKANLinear
from export.inputs import read_inputs
from export.network import Call, describe_network
from export.proof.reference import make_reference
from tests import zoo


def test_a_kan_behind_a_flatten_is_probed_at_its_knots(tmp_path: Path) -> None:
    network = zoo.flattening_net()
    manifest = export_module(network, name="m", output=tmp_path, input_shape=(3, 4))
    assert manifest.input_range is not None
    assert manifest.input_range.low == pytest.approx([-1.0] * 12)
    with np.load(tmp_path / "m" / "1" / "golden.npz") as golden:
        rows = golden["input_0"].reshape(-1, 12)
    knots = np.asarray(network.kan.layers[0].grid[0])
    assert np.isin(knots[3], rows)


@pytest.mark.parametrize(
    ("weight", "share"),
    [("fc1.product.weight", 0.5), ("fc2.product.weight", 0.999), ("features.0.bias", 0.0)],
    ids=["spline", "base path", "another layer"],
)
@pytest.mark.filterwarnings("ignore:onnxruntime gives numbers")
def test_one_wrong_weight_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str, share: float
) -> None:
    write = onnx_graph.write_onnx

    def write_wrong(call: Call, *arguments: Any, **options: Any) -> frozenset[str]:
        tensor = dict((*call.named_parameters(), *call.named_buffers()))[f"module.{weight}"]
        with torch.no_grad():
            kept = tensor.clone()
            tensor[np.unravel_index(int(share * tensor.numel()), tensor.shape)] += 1e-2
            fused = write(call, *arguments, **options)
            tensor.copy_(kept)
        return fused

    monkeypatch.setattr("export.pipeline.write_onnx", write_wrong)
    with pytest.raises(ParityError, match=r"onnxruntime cpu(, fused)? does not compute"):
        export_module(zoo.conv_net(), name="m", output=tmp_path / "models", input_shape=(3, 8, 8))
    assert not (tmp_path / "models").exists()


@pytest.mark.filterwarnings("ignore:onnxruntime gives numbers")
def test_an_error_outside_the_grid_alone_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LoweredKANLinear.forward

    def clamped(self: LoweredKANLinear, x: Tensor) -> Tensor:
        return forward(self, x.clamp(-2.2, 2.2))

    monkeypatch.setattr(LoweredKANLinear, "forward", clamped)
    with pytest.raises(ParityError, match="does not compute"):
        export_module(
            zoo.flattening_net(), name="m", output=tmp_path / "models", input_shape=(3, 4)
        )


def test_true_exports_of_many_networks_pass(tmp_path: Path) -> None:
    """Noise of float32 is not an error: networks of many kinds and sizes of weights."""
    rng = np.random.default_rng(0)
    for seed in range(6):
        torch.manual_seed(seed)
        width = int(rng.integers(3, 40))
        network = nn.Sequential(
            first := nn.Linear(width, 12),
            [nn.LayerNorm(12), nn.BatchNorm1d(12), nn.Tanh()][seed % 3],
            zoo.KAN([12, 8, 4]),
            last := nn.Linear(4, 3),
        )
        with torch.no_grad():
            first.weight.mul_(10.0 ** rng.integers(-2, 3))
            last.weight.mul_(10.0 ** rng.integers(-4, 4))
        manifest = export_module(network, name=f"m{seed}", output=tmp_path, input_shape=(width,))
        assert manifest.reference == "float64"


class InsistsOnSingle(nn.Module):
    """Has a constant that does not follow the module's precision."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = zoo.KANLinear(3, 2)
        self.constant = torch.eye(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kan(x @ self.constant)
        return y


def test_a_network_without_a_float64_form_is_compared_with_itself(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot run in float64"):
        manifest = export_module(InsistsOnSingle(), name="m", output=tmp_path, input_shape=(3,))
    assert manifest.reference == "float32"


def test_a_runtime_that_swallows_nan_in_a_kan_layer_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LoweredKANLinear.forward
    monkeypatch.setattr(
        LoweredKANLinear, "forward", lambda self, x: forward(self, torch.nan_to_num(x))
    )
    with pytest.raises(ParityError, match="nan"):
        export_module(zoo.flattening_net(), name="m", output=tmp_path, input_shape=(3, 4))


class Weak(nn.Module):
    """One output in which a KAN layer hardly shows, another that is nothing but KAN layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = zoo.KANLinear(6, 5), zoo.KANLinear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.a(x)
        return self.b(hidden), x.sum(1, keepdim=True) + 1e-6 * hidden


def test_noise_at_one_output_excuses_nothing_at_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    export_module(Weak(), name="right", output=tmp_path, input_shape=6)
    forward = LoweredKANLinear.forward
    monkeypatch.setattr(LoweredKANLinear, "forward", lambda self, x: 1.00003 * forward(self, x))
    with pytest.raises(ParityError, match=r"output output_0\["):
        export_module(Weak(), name="wrong", output=tmp_path, input_shape=6)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (y, x.mean(1, keepdim=True)),
        lambda x, y: (y, x - x.mean(1, keepdim=True)),
        lambda x, y: (nn.functional.gelu(3 * y - 6), y),
        lambda x, y: (1.1 * x[:, :4] + 1e-5 * y, y),
    ],
)
def test_arithmetic_without_weights_is_as_noisy_as_it_is(
    tmp_path: Path, form: Callable[[Tensor, Tensor], Any]
) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = zoo.KANLinear(32, 4)

        def forward(self, x: Tensor) -> Any:
            return form(x, self.k(x))

    torch.manual_seed(0)
    export_module(Mixing(), name="m", output=tmp_path, input_shape=32)


class Refusing(nn.Module):
    """Takes nothing negative."""

    def __init__(self) -> None:
        super().__init__()
        self.k = zoo.KANLinear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and not isinstance(x, torch.fx.Proxy):
            assert (x >= 0).all()
        y: Tensor = self.k(x)
        return y


def test_inputs_that_the_network_refuses_are_left_out_and_told(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((20, 3))
    with pytest.warns(UserWarning, match="itself refuses inputs of the kind small, normal"):
        export_module(Refusing(), name="m", output=tmp_path, samples=rows)
    with pytest.raises(InputError, match=r"does not take input FP32 \[batch, 3\]: AssertionError"):
        export_module(Refusing(), name="m", output=tmp_path, input_shape=3)


def test_samples_are_compared_too_and_must_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = kan_model.KAN([3, 4, 2])
    rows = np.random.default_rng(0).standard_normal((10, 3))
    with_samples = export_module(network, name="a", output=tmp_path, samples=rows)
    without = export_module(network, name="b", output=tmp_path)
    assert with_samples.parity[0].probes == without.parity[0].probes + 4 * 10
    with pytest.raises(InputError, match=r"expected 3 numbers in a row, .* found \[batch, 2\]"):
        export_module(network, name="c", output=tmp_path, samples=rows[:, :2])


class Beside(nn.Module):
    """A KAN layer, and beside it an output a million times as noisy."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.k = zoo.KANLinear(6, 3)
        self.factor = factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.k(x), self.factor * x.sum(1, keepdim=True)


def test_what_is_allowed_at_an_output_does_not_depend_on_the_others() -> None:
    allowed = []
    for factor in (1.0, 1e6):
        torch.manual_seed(0)
        network = describe_network(Beside(factor).eval(), read_inputs(6, None))
        allowed.append(make_reference(network).tolerance[:, :3])
    np.testing.assert_allclose(allowed[0], allowed[1], rtol=0.5)
