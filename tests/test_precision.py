"""Weights of fewer bits: what stays true, and how far off it may be."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import (
    InputError,
    NetworkError,
    ParityError,
    export_checkpoint,
    export_module,
)
from export.conversion import lowering
from export.conversion.lowering import LoweredKANLinear, probes_within
from export.conversion.precision import COARSEST, PRECISIONS, Int8Product
from export.inputs import read_inputs
from export.network import describe_network
from export.runtimes import load_onnx
from kan_bundle.manifest import Form, Manifest, Precision
from kan_model import KAN, KANLinear
from tests.conftest import GOLDENS, run_export
from tests.layers import answers_of_the_oracle, make_layer, write, write_and_run

UNIFORM = GOLDENS / "uniform_4x8x3.pt"
REDUCED = [precision for precision in PRECISIONS if precision != "fp32"]


@pytest.mark.parametrize("knots", ["uniform", "adapted"])
@pytest.mark.parametrize("precision", REDUCED)
def test_it_is_as_close_as_it_says(tmp_path: Path, precision: Precision, knots: str) -> None:
    layer = make_layer(features=16, knots=knots)
    rows = probes_within(layer)
    module = LoweredKANLinear(layer, "recursion" if knots == "adapted" else "cardinal", precision)
    expected = answers_of_the_oracle(layer, rows[::9])
    allowed = COARSEST[precision] * np.abs(expected).max(axis=0)
    for found in (module(rows[::9]).detach().numpy(), write_and_run(module, rows[::9], tmp_path)):
        assert (np.abs(found - expected) <= allowed).all()


@pytest.mark.parametrize("precision", REDUCED)
def test_rows_do_not_influence_each_other(tmp_path: Path, precision: Precision) -> None:
    """Also beside one of another size, which would share a scale with them."""
    layer = make_layer()
    rows = torch.cat([probes_within(layer)[:20], torch.full((1, 4), 1e6)])
    run = write(LoweredKANLinear(layer, "cardinal", precision), rows, tmp_path)
    together = run(rows)
    alone = np.concatenate([run(row[None]) for row in rows[:3]])
    np.testing.assert_allclose(together[:3], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.Identity])
@pytest.mark.parametrize("form", ["cardinal", "recursion"])
@pytest.mark.parametrize("precision", REDUCED)
def test_what_is_no_number_or_far_outside_is_answered_as_in_float32(
    tmp_path: Path, precision: Precision, form: Form, activation: type[nn.Module]
) -> None:
    layer = make_layer()
    layer.base_activation = activation()
    rows = torch.zeros(5, 4)
    rows[:, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e7, -1e7])
    found = write_and_run(LoweredKANLinear(layer, form, precision), rows, tmp_path)
    expected = layer(rows).detach().numpy()
    assert np.isnan(expected[:3]).all()
    size = np.abs(expected[3:]).max(axis=0)  # 1e7 is beyond float16
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    assert (np.abs(found - expected)[3:] <= COARSEST[precision] * size).all()


@pytest.mark.parametrize("precision", REDUCED)
def test_a_nearly_constant_feature_survives(tmp_path: Path, precision: Precision) -> None:
    """Its knots are 8e-5 apart; in float16 they coincide, and a model cast to it is all NaN."""
    torch.manual_seed(0)
    kan = KAN([3, 4, 2])
    samples = torch.randn(200, 3)
    samples[:, 1] = 0.5
    kan.layers[0].update_grid(samples)
    assert bool(kan.half()(samples.half()).isnan().all())
    torch.manual_seed(0)
    kan = KAN([3, 4, 2])
    kan.layers[0].update_grid(samples)
    export_module(kan, name="m", output=tmp_path, precision=precision)
    found = load_onnx(tmp_path / "m" / "1" / "model.onnx")([samples.numpy()])[0]
    expected = kan(samples).detach().numpy()
    assert np.abs(found - expected).max() <= COARSEST[precision] * np.abs(expected).max()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("precision", REDUCED)
def test_weights_of_very_different_sizes_are_exported(
    tmp_path: Path, precision: Precision, seed: int
) -> None:
    """Pruned networks are like that, and a lone feature far outside shows a small weight alone."""
    torch.manual_seed(seed)
    kan = KAN([10, 10])
    with torch.no_grad():
        kept = torch.rand(10, 10) < 0.1
        kan.layers[0].base_weight.mul_(torch.where(kept, 1e5, 1e-9))
        kan.layers[0].spline_weight.mul_(torch.where(kept, 1e5, 1e-9).unsqueeze(-1))
    export_module(kan, name="m", output=tmp_path, precision=precision)


@pytest.mark.parametrize("precision", REDUCED)
def test_a_wide_layer_without_its_spline_is_refused(
    tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its terms add up to much more than its outputs, which is no excuse."""
    torch.manual_seed(0)
    kan = KAN([784, 3], scale_noise=5.0)
    name = "Int8Product" if precision == "int8" else "HalfProduct"
    product = getattr(lowering, name)

    def without(spline: Tensor, *others: Any) -> nn.Module:
        made: nn.Module = product(torch.zeros_like(spline), *others)
        return made

    monkeypatch.setattr(lowering, name, without)
    with pytest.raises(ParityError, match="weights are not rounded to the nearest"):
        export_module(kan, name="m", output=tmp_path, precision=precision)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_small_spline_beside_a_large_base_path_keeps_its_digits(precision: Precision) -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.base_weight.mul_(1e9)
    layer.base_activation = nn.ReLU()
    rows = -torch.rand(100, 4)  # where nothing of the base path is left
    expected = layer(rows)
    found = LoweredKANLinear(layer, "cardinal", precision)(rows)
    assert (found - expected).abs().max() <= COARSEST[precision] * expected.abs().max()


def test_int8_sums_fit_where_pairs_are_added_in_16_bits() -> None:
    """Processors without VNNI do that, and cut off what is larger."""
    layer = make_layer(features=8)
    module = LoweredKANLinear(layer, "cardinal", "int8")
    product = module.product
    assert isinstance(product, Int8Product)
    rows = torch.cat([probes_within(layer), 1e6 * torch.randn(50, 8)])
    levels = (module.basis(rows) / product.step).round()
    assert (float(levels.min()), float(levels.max())) == (0, 127)
    assert 2 * 127 * int(product.spline.abs().max()) < 2**15


def test_the_file_shrinks_with_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kan = KAN([200, 64, 10])
    sizes = {}
    for precision in PRECISIONS:
        export_module(kan, name=precision, output=tmp_path, precision=precision)
        sizes[precision] = (tmp_path / precision / "1" / "model.onnx").stat().st_size
    assert sizes["fp16"] < 0.55 * sizes["fp32"]
    assert sizes["bf16"] < 0.55 * sizes["fp32"]
    assert sizes["int8"] < 0.35 * sizes["fp32"]
    types = {
        t.data_type for t in onnx.load(tmp_path / "int8" / "1" / "model.onnx").graph.initializer
    }
    assert onnx.TensorProto.INT8 in types


def test_int8_has_a_scale_for_each_output_and_part() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.spline_weight[1] *= 100
        layer.base_weight[2] *= 100
    product = LoweredKANLinear(layer, "cardinal", "int8").product
    assert isinstance(product, Int8Product)
    assert product.spline_scale[1] > 20 * product.spline_scale[0]
    assert product.base_scale[2] > 20 * product.base_scale[0]
    assert product.base_scale[1] < 5 * product.base_scale[0]
    rows = probes_within(layer)
    off = (LoweredKANLinear(layer, "cardinal", "int8")(rows) - layer(rows)).abs().amax(0)
    assert (off <= COARSEST["int8"] * layer(rows).abs().amax(0)).all()


def test_samples_choose_the_scales_of_int8() -> None:
    """On data at one end of the grid, a scale that clips weights of the other end is better."""
    layer = make_layer(features=8)
    samples = -1.5 + 0.5 * torch.rand(200, 8)
    with torch.no_grad():
        layer.spline_weight[..., 6:] *= 1.6

    def off(given: Tensor | None) -> float:
        module = LoweredKANLinear(layer, "cardinal", "int8", given)
        return float((module(samples) - layer(samples)).detach().square().mean())

    assert off(samples) < 0.9 * off(None)


def test_the_samples_reach_every_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kan = KAN([6, 5, 3])
    samples = np.random.default_rng(0).uniform(-1, -0.8, (50, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", samples)
    weights = []
    for name, given in (("with", str(tmp_path / "x.npy")), ("without", None)):
        export_module(kan, name=name, output=tmp_path, precision="int8", samples=given)
        graph = onnx.load(tmp_path / name / "1" / "model.onnx").graph
        found = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        weights.append(found["layers.1.product.spline_scale"])
    assert not np.array_equal(weights[0], weights[1])


def test_samples_from_the_whole_file_choose_the_scales() -> None:
    """Rows sorted by class must not leave all but the first class out."""
    kan = KAN([2, 1])
    samples = np.linspace(-1, 1, 4000, dtype=np.float32).reshape(2000, 2)
    network = describe_network(kan, read_inputs(None, samples))
    reached = lowering._inputs_of_layers(network)["layers.0"]
    assert float(reached.min()) == -1
    assert float(reached.max()) == 1
    assert len(reached) <= 512


def test_samples_that_the_network_cannot_take_are_refused(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.head = KANLinear(4, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.head(self.embedding(tokens))
            return y

    samples = np.zeros((300, 1), np.int64)
    samples[200:] = 99
    with pytest.raises(NetworkError, match="fails on the samples: IndexError"):
        export_module(Tokens(), name="m", output=tmp_path, precision="int8", samples=samples)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_manifest_says_how_close_and_how_often_the_argmax_agrees(
    tmp_path: Path, precision: Precision
) -> None:
    manifest: Manifest = export_checkpoint(
        UNIFORM, output=tmp_path, activation="silu", precision=precision
    )
    assert manifest.precision == precision
    served = manifest.parity[1]
    assert served.runtime == "onnxruntime cpu"
    assert served.tolerance == 1e-5
    assert (manifest.approximation is None) == (precision == "fp32")
    assert served.same_argmax is not None
    assert served.same_argmax > 0.9
    assert manifest.parity[0].same_argmax == 1.0


def test_one_number_has_no_argmax(tmp_path: Path) -> None:
    manifest = export_module(KAN([3, 1]), name="m", output=tmp_path)
    assert [record.same_argmax for record in manifest.parity] == [None] * len(manifest.parity)


def test_the_command_tells_the_agreement(tmp_path: Path) -> None:
    run = run_export(
        *(UNIFORM, "--precision", "int8", "--activation", "silu"),
        *("--output", tmp_path, "--json"),
    )
    assert run.returncode == 0, run.stderr
    told = " ".join(run.stderr.split())
    assert "equal to the network in int8" in run.stderr
    assert re.search(r"changes the outputs on .* by at most .*, typically .*; same argmax on", told)
    assert "fewer bits do not run fused, so on CPU they are slower where kan_ops is" in told
    assert json.loads(run.stdout)["manifest"]["precision"] == "int8"


def test_a_wrong_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--precision: expected fp32, fp16, bf16, int8, found 'x'"):
        export_module(KAN([3, 1]), name="m", output=tmp_path, precision="x")  # type: ignore[arg-type]
    network = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(InputError, match="the network has none; leave it out"):
        export_module(network, name="m", output=tmp_path, input_shape="3", precision="int8")
    assert run_export(UNIFORM, "--precision", "fp8").returncode == 2
    inspected = run_export("inspect", UNIFORM, "--precision", "int8", "--opset", "18")
    assert inspected.returncode == 2
    assert "leave out --opset, --precision" in inspected.stderr
    refused = run_export(UNIFORM, "--opset", "16")
    assert refused.returncode == 2
    assert "expected 17 to" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_all_zero_stay_so() -> None:
    layer = KANLinear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    rows = probes_within(layer)
    assert not LoweredKANLinear(layer, "cardinal", "int8")(rows).any()
