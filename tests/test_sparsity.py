"""Which edges count, what leaving them out changes, and files of a network without them."""

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import InputError, export_checkpoint, export_module
from export.inputs import read_inputs
from export.network import describe_network
from export.report import Report
from export.runtimes import load_onnx, load_torchscript
from export.sparsity import prune_further
from kan_bundle.integrity import record_file
from kan_bundle.manifest import read_manifest
from kan_model import KAN, KANLinear
from kan_model.splines import b_spline_basis
from tests import oracle
from tests.conftest import GOLDENS, run_export
from tests.edges import WithKAN, arrays, pruned, uneven, within, zeroed

UNIFORM = GOLDENS / "uniform_4x8x3.pt"


@pytest.mark.parametrize("threshold", [1e-3, 0.03, 0.1])
def test_the_files_compute_the_network_with_means_for_the_edges_left_out(
    tmp_path: Path, quiet: Report, threshold: float
) -> None:
    kan = uneven([5, 7, 3])
    export_module(kan, name="m", output=tmp_path, prune=threshold, report=quiet)
    x = within(kan)
    expected = pruned(kan, threshold, x)
    assert np.abs(expected - oracle.kan(arrays(kan), x, oracle.silu)).max() > 1e-4
    folder = tmp_path / "m" / "1"
    runs = (
        load_onnx(folder / "model.onnx"),
        load_onnx(folder / "model.onnx", fused=True),
        load_torchscript(folder / "model.ts"),
    )
    for run in runs:
        found = run([x])[0]
        assert (np.abs(found - expected) <= 1e-5 * np.maximum(1, np.abs(expected))).all()


def test_importance_is_measured_on_the_samples_that_reach_a_layer(
    tmp_path: Path, quiet: Report
) -> None:
    kan = uneven([4, 6, 2])
    samples = torch.from_numpy(within(kan, 50)) * torch.tensor([1.0, 0.01, 0.3, 1.0])
    done = export_module(
        kan, name="m", output=tmp_path, prune=0.01, samples=samples.numpy(), report=quiet
    )
    state = zeroed(kan, 0.01, samples)
    assert done.pruning is not None
    assert [layer.zeroed for layer in done.pruning.layers] == [
        int((state[f"layers.{i}.base_weight"] == 0).sum()) for i in range(2)
    ]
    expected = pruned(kan, 0.01, samples.numpy(), samples)
    before = oracle.kan(arrays(kan), samples.numpy(), oracle.silu)
    change = done.pruning.change
    assert (change.on, change.rows) == ("samples", 50)
    assert change.largest == pytest.approx(np.abs(expected - before).max(), rel=1e-6)
    assert change.typical == pytest.approx(np.sqrt(((expected - before) ** 2).mean()), rel=1e-6)
    assert change.size == pytest.approx(np.sqrt((before**2).mean()), rel=1e-9)
    same = (expected.argmax(1) == before.argmax(1)).mean()
    assert change.same_argmax == pytest.approx(same)


def test_the_manifest_and_the_file_tell_what_was_left_out(tmp_path: Path, quiet: Report) -> None:
    kan = uneven([5, 7, 3])
    export_module(kan, name="m", output=tmp_path, prune=0.03, report=quiet)
    record = read_manifest(tmp_path / "m" / "1").pruning
    assert record is not None
    assert record.threshold == 0.03
    assert [(layer.name, layer.edges) for layer in record.layers] == [
        ("layers.0", 35),
        ("layers.1", 21),
    ]
    model = onnx.load(tmp_path / "m" / "1" / "model.onnx")
    told = {p.key: p.value for p in model.metadata_props}
    assert json.loads(told["kanserve.pruning"])["threshold"] == 0.03


def test_neither_the_module_nor_the_file_is_changed(tmp_path: Path, quiet: Report) -> None:
    kan = uneven([5, 7, 3])
    before = arrays(kan)
    export_module(kan, name="m", output=tmp_path, prune=0.03, report=quiet)
    for key, value in arrays(kan).items():
        np.testing.assert_array_equal(value, before[key])
    file = tmp_path / "m.pt"
    torch.save(kan.state_dict(), file)
    record = record_file(file)
    export_checkpoint(file, output=tmp_path, activation="silu", prune=0.03, report=quiet)
    assert record_file(file) == record


def test_without_threshold_nothing_is_left_out(repository: Path) -> None:
    assert read_manifest(repository / "uniform_4x8x3" / "1").pruning is None


def told_of(report: Report) -> str:
    file = report._console.file
    assert isinstance(file, io.StringIO)
    return " ".join(file.getvalue().split())


def test_a_change_that_no_row_shows_is_still_another_function(
    tmp_path: Path, quiet: Report
) -> None:
    """One input never varies in the samples, so its edges go; other rows would show it."""
    torch.manual_seed(0)
    kan = KAN([3, 4, 2], grid_range=(1, 2))
    x = np.random.default_rng(0).uniform(1, 2, (64, 3)).astype(np.float32)
    x[:, 1] = 0
    done = export_module(kan, name="m", output=tmp_path, prune=0.0, samples=x, report=quiet)
    assert done.pruning is not None
    assert (done.pruning.zeroed, done.pruning.already) == (4, 0)
    assert done.pruning.change.largest == 0
    elsewhere = np.full((1, 3), 1.5)
    found = load_onnx(tmp_path / "m" / "1" / "model.onnx")([elsewhere.astype(np.float32)])[0]
    assert np.abs(found - oracle.kan(arrays(kan), elsewhere, oracle.silu)).max() > 1e-3
    assert any("NO LONGER the checkpoint's function" in line for line in quiet.warnings)
    assert "4 of 20 edges left out, 20.0%: layers.0: 4 of 12 layers.1: 0 of 8" in told_of(quiet)


def test_edges_without_weight_are_told_from_those_that_lose_theirs(
    tmp_path: Path, quiet: Report
) -> None:
    kan = uneven([5, 7, 3])
    with torch.no_grad():
        for weight in (kan.layers[0].base_weight, kan.layers[0].spline_weight):
            weight[:2, 1] = 0
    done = export_module(kan, name="m", output=tmp_path, prune=0.0, report=quiet)
    assert done.pruning is not None
    assert (done.pruning.zeroed, done.pruning.already) == (2, 2)
    assert not any("NO LONGER" in line for line in quiet.warnings)
    assert "2 of 56 edges left out, 3.6%, of which 2 had no weight before:" in told_of(quiet)
    done = export_module(kan, name="m", output=tmp_path, prune=0.03, report=quiet)
    assert done.pruning is not None
    assert done.pruning.zeroed > done.pruning.already == 2
    assert any("NO LONGER" in line for line in quiet.warnings)
    page = (tmp_path / "m" / "2" / "report.html").read_text()
    assert f"{done.pruning.zeroed} of 56 edges were left out, of which 2 had no weight" in page


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_fewer_bits_are_compared_with_the_pruned_network(
    tmp_path: Path, quiet: Report, precision: str
) -> None:
    kan = uneven([5, 7, 3])
    export_module(kan, name="m", output=tmp_path, prune=0.1, precision=precision, report=quiet)  # type: ignore[arg-type]
    x = within(kan)
    found = load_onnx(tmp_path / "m" / "1" / "model.onnx")([x])[0]
    expected = pruned(kan, 0.1, x)
    size = np.abs(expected).max(axis=0)
    assert (np.abs(found - expected) <= 0.1 * size).all()


def test_a_float64_checkpoint_is_pruned_in_both_precisions(tmp_path: Path, quiet: Report) -> None:
    kan = uneven([4, 5, 2]).double()
    done = export_module(kan, name="m", output=tmp_path, prune=0.05, report=quiet)
    assert done.pruning is not None
    assert done.pruning.layers[0].zeroed > 0
    x = within(kan)
    expected = pruned(kan, 0.05, x)
    found = load_onnx(tmp_path / "m" / "1" / "model.onnx")([x])[0]
    assert (np.abs(found - expected) <= 1e-5 * np.maximum(1, np.abs(expected))).all()


def test_kan_layers_inside_a_network_are_pruned(tmp_path: Path, quiet: Report) -> None:
    torch.manual_seed(0)
    network = WithKAN().eval()
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    done = export_module(
        network, name="m", output=tmp_path, prune=0.05, input_shape=3, samples=x, report=quiet
    )
    assert done.pruning is not None
    assert [layer.name for layer in done.pruning.layers] == ["head.layers.0", "head.layers.1"]
    assert done.pruning.nodes_removed is None
    hidden = torch.tanh(network.before(torch.from_numpy(x))).detach()
    expected = pruned(network.head, 0.05, hidden.numpy(), hidden) + 1
    found = load_onnx(tmp_path / "m" / "1" / "model.onnx")([x])[0]
    assert (np.abs(found - expected) <= 2e-5 * np.maximum(1, np.abs(expected))).all()
    assert done.pruning.change.largest > 1e-4


class Frozen(nn.Module):
    """Somebody's efficient-KAN layer whose weights are buffers, because they are not trained."""

    base_weight: Tensor
    spline_weight: Tensor
    spline_scaler: Tensor
    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        (layer,) = uneven([4, 3]).layers
        self.base_activation = nn.SiLU()
        for name in ("base_weight", "spline_weight", "spline_scaler", "grid"):
            self.register_buffer(name, getattr(layer, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        basis = b_spline_basis(x, self.grid, 3).flatten(-2)
        weight = (self.spline_weight * self.spline_scaler[..., None]).flatten(1)
        base = nn.functional.linear(self.base_activation(x), self.base_weight)
        return base + nn.functional.linear(basis, weight)


def test_a_layer_whose_weights_are_buffers_is_pruned_too(tmp_path: Path, quiet: Report) -> None:
    network = nn.Sequential(Frozen())
    done = export_module(network, name="m", output=tmp_path, prune=0.3, input_shape=4, report=quiet)
    assert done.pruning is not None
    assert done.pruning.zeroed > 0
    assert done.pruning.change.largest > 1e-4
    kan = uneven([4, 3])
    x = within(kan)
    expected = pruned(kan, 0.3, x)
    found = load_onnx(tmp_path / "m" / "1" / "model.onnx")([x])[0]
    assert (np.abs(found - expected) <= 1e-5 * np.maximum(1, np.abs(expected))).all()


# What is refused.


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 2.0, float("nan"), float("inf")])
def test_a_threshold_is_a_share(tmp_path: Path, quiet: Report, threshold: float) -> None:
    with pytest.raises(InputError, match="--prune: expected a share"):
        export_module(KAN([3, 2]), name="m", output=tmp_path, prune=threshold, report=quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["-0.1", "1", "nan", "inf", "a tenth", ""])
def test_the_command_takes_a_share_alone(text: str) -> None:
    done = run_export(UNIFORM, f"--prune={text}")
    assert done.returncode == 2
    assert "--prune: expected a number from 0 to below 1" in done.stderr
    assert done.stdout == ""


def test_a_layer_without_weights_has_no_edges_to_rank(tmp_path: Path, quiet: Report) -> None:
    kan = uneven([3, 4, 2])
    with torch.no_grad():
        kan.layers[1].base_weight.zero_()
        kan.layers[1].spline_weight.zero_()
    with pytest.raises(InputError, match=r"no edge of layers\.1 varies over its grid"):
        export_module(kan, name="m", output=tmp_path, prune=0.0, report=quiet)
    assert list(tmp_path.iterdir()) == []


def test_samples_that_do_not_vary_rank_no_edges() -> None:
    inputs = read_inputs(None, np.full((20, 3), 0.1, np.float32))
    network = describe_network(uneven([3, 4, 2]), inputs)
    with pytest.raises(InputError, match=r"no edge of layers\.0 varies .* they do not vary"):
        list(prune_further(network, [0.1]))


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)


def test_importances_that_are_not_finite_rank_no_edges() -> None:
    """The activation is NaN over a half of the grid."""
    network = describe_network(uneven([3, 4, 2], base_activation=Logarithm), None)
    with pytest.raises(InputError, match=r"12 of 12 edges of layers\.0 is not finite"):
        list(prune_further(network, [0.1]))


def test_a_network_without_a_way_through_is_refused(tmp_path: Path, quiet: Report) -> None:
    """Each layer keeps an edge, and they do not meet."""
    kan = uneven([2, 2, 1])
    with torch.no_grad():
        for layer in kan.layers:
            layer.base_weight.zero_()
            layer.spline_weight.zero_()
        kan.layers[0].base_weight[0, 0] = 1
        kan.layers[1].base_weight[0, 1] = 1
    with pytest.raises(InputError, match="no way from an input to an output"):
        export_module(kan, name="m", output=tmp_path, prune=0.0, report=quiet)


def test_a_network_without_kan_layers_has_no_edges(tmp_path: Path, quiet: Report) -> None:
    with pytest.raises(InputError, match=r"the network\s+has none"):
        export_module(
            nn.Linear(3, 2), name="m", output=tmp_path, input_shape=3, prune=0.1, report=quiet
        )


def test_an_activation_over_another_axis_is_refused_in_plain_words(
    tmp_path: Path, quiet: Report
) -> None:
    layer = KANLinear(4, 2, base_activation=lambda: nn.Softmax(dim=2))
    with pytest.raises(InputError, match=r"fails on numbers of its own \(IndexError: "):
        export_module(layer, name="m", output=tmp_path, input_shape=(3, 4), prune=0.1, report=quiet)
