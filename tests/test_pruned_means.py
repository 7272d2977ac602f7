"""Edges that are left out leave their mean: constant ones change nothing, others change less."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import kan_ops
from export import export_checkpoint, export_module
from export.inputs import read_inputs
from export.narrowing import OffsetLayer
from export.network import Network, describe_network
from export.report import Report
from export.runtimes import load_onnx, load_torchscript
from export.sparsity import prune_further, prune_network
from kan_model import KAN, KANLinear
from tests.edges import WithKAN, pruned, uneven, within, zeroed


def network_of(module: nn.Module, x: np.ndarray) -> Network:
    return describe_network(module.eval(), read_inputs(None, x))


def answers_in_float64(module: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = module.double()(torch.from_numpy(x).double()).numpy()
    module.float()
    return found


def without_edges(network: Network, x: np.ndarray, threshold: float) -> np.ndarray:
    found, _, _ = prune_network(network, threshold)
    return answers_in_float64(found.call.module, x)


class TwoTimes(nn.Module):
    """One layer that is called in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = KANLinear(3, 3)
        nn.init.normal_(self.layer.spline_weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))  # type: ignore[no-any-return]


def rows_with_a_constant(features: int, rows: int = 50) -> np.ndarray:
    x = np.random.default_rng(0).uniform(-1, 1, (rows, features)).astype(np.float32)
    x[:, 1] = 0.37
    return x


NETWORKS: dict[str, Any] = {
    "kan": lambda: uneven([4, 6, 2]),
    "own activation": lambda: uneven([4, 6, 2], base_activation=nn.PReLU),
    "steps": lambda: uneven([4, 6, 2], spline_order=0),
    "layer": lambda: uneven([4, 2]).layers[0],
    "inside": lambda: nn.Sequential(uneven([4, 6, 2]), nn.Tanh()),
    "between": lambda: nn.Sequential(nn.LayerNorm(4), uneven([4, 3]), nn.Linear(3, 2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_leaving_out_constant_edges_changes_nothing_on_the_samples(name: str) -> None:
    torch.manual_seed(0)
    module = NETWORKS[name]().eval()
    x = rows_with_a_constant(4)
    if name == "between":
        module[0] = nn.Identity()
    expected = answers_in_float64(module, x)
    network = network_of(module, x)
    ((step),) = prune_further(network, [0.0])
    assert step.zeroed > 0
    assert step.change is not None
    assert step.change.largest <= 1e-7 * np.abs(expected).max()
    assert without_edges(network, x, 0.0) == pytest.approx(expected, rel=0, abs=1e-7)


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1])
def test_a_mean_is_that_of_the_edges_definition(threshold: float) -> None:
    kan = uneven([5, 7, 3])
    samples = within(kan, 80) * np.array([1, 0.01, 0.3, 1, 1], np.float32) + np.float32(0.2)
    expected = pruned(kan, threshold, samples, torch.from_numpy(samples))
    found = without_edges(network_of(kan, samples), samples, threshold)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1, 0.3])
def test_keeping_means_changes_less_than_zeros_would(threshold: float) -> None:
    """On nearly constant inputs, where the means are most of the edges."""
    kan = uneven([6, 2])
    samples = within(kan, 200) * np.float32(0.05) + np.float32(0.6)
    before = answers_in_float64(kan, samples)
    kept = without_edges(network_of(kan, samples), samples, threshold) - before
    zeros = uneven([6, 2])
    zeros.load_state_dict(
        {
            key: torch.from_numpy(value)
            for key, value in zeroed(kan, threshold, torch.from_numpy(samples)).items()
        }
    )
    dropped = answers_in_float64(zeros, samples) - before
    assert (kept**2).mean() < 0.1 * (dropped**2).mean()


def test_an_input_that_varies_in_a_few_of_many_rows_is_not_constant() -> None:
    """Of 5,000 rows a thousand are measured; the three that differ are not among them."""
    kan = uneven([4, 6, 2])
    x = rows_with_a_constant(4, 5000)
    taken = np.linspace(0, 4999, 1024).astype(int)
    others = np.setdiff1d(np.arange(5000), taken)
    x[others[[1000, 2000, -7]], 1] = 0.9
    expected = answers_in_float64(kan, x)
    found = without_edges(network_of(kan, x), x, 0.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
    assert (without_edges(network_of(kan, x[:1000]), x, 0.0) != found).any()


def test_a_layer_that_is_called_twice_is_constant_only_if_both_calls_are() -> None:
    torch.manual_seed(0)
    module = TwoTimes().eval()
    x = rows_with_a_constant(3)
    network = network_of(module, x)
    (step,) = prune_further(network, [0.0])
    assert step.zeroed == 0
    np.testing.assert_allclose(
        without_edges(network, x, 0.3).mean(axis=0),
        answers_in_float64(module, x).mean(axis=0),
        atol=0.5,
    )


def test_nan_and_infinity_in_an_input_without_edges_still_show() -> None:
    kan = uneven([4, 6, 2])
    x = rows_with_a_constant(4)
    network = network_of(kan, x)
    x[3, 1], x[4, 1] = np.nan, np.inf
    found = without_edges(network, x, 0.0)
    assert np.isnan(found[3:5]).all()
    assert np.isfinite(np.delete(found, (3, 4), axis=0)).all()


@pytest.mark.parametrize("name", ["kan", "inside"])
def test_files_hold_each_layer_as_one_node_and_its_constant(
    tmp_path: Path, quiet: Report, name: str
) -> None:
    torch.manual_seed(0)
    module = NETWORKS[name]().eval()
    x = rows_with_a_constant(4)
    done = export_module(module, name="m", output=tmp_path, prune=0.0, samples=x, report=quiet)
    folder = tmp_path / "m" / "1"
    expected = answers_in_float64(module, x)
    for run in (
        load_onnx(folder / "model.onnx"),
        load_onnx(folder / "model.onnx", fused=True),
        load_torchscript(folder / "model.ts"),
    ):
        np.testing.assert_allclose(run([x])[0], expected, rtol=0, atol=1e-6)
    assert [layer.operator for layer in done.layers] == [kan_ops.OPERATOR] * 2
    graph = onnx.load(folder / "model.onnx").graph
    assert sum(node.op_type == kan_ops.OPERATOR for node in graph.node) == 2
    assert sum(node.op_type == "Add" for node in graph.node) == 1
    assert done.pruning is not None
    assert done.pruning.zeroed == 6
    page = (folder / "report.html").read_text()
    assert "changes the outputs on 50 rows by at most" in page
    assert page.count("<figure class") == (1 if name == "kan" else 2)  # one diagram of a whole KAN


def test_a_node_that_only_pruned_edges_lead_to_goes_with_its_constant(
    tmp_path: Path, quiet: Report
) -> None:
    """It is not zero, and what it gives to the next layer is not that of zero."""
    kan = uneven([4, 5, 2])
    with torch.no_grad():
        for i in (0, 2, 3):
            kan.layers[0].base_weight[3, i] = 0
            kan.layers[0].spline_weight[3, i] = 0
        kan.layers[0].base_weight[3, 1] = 2.0
    x = rows_with_a_constant(4)
    done = export_module(kan, name="m", output=tmp_path, prune=0.0, samples=x, report=quiet)
    assert done.pruning is not None
    assert done.pruning.nodes_removed == (0, 1, 0)
    expected = answers_in_float64(kan, x)
    found = load_onnx(tmp_path / "m" / "1" / "model.onnx", fused=True)([x])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


# What is not changed.


def test_the_callers_network_is_not_changed(tmp_path: Path, quiet: Report) -> None:
    mine = nn.Sequential(uneven([4, 6, 2]), nn.Dropout(0.1))
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    torch.save(mine.state_dict(), tmp_path / "m.pt")
    export_checkpoint(
        tmp_path / "m.pt",
        model=lambda: mine,
        output=tmp_path / "models",
        prune=0.1,
        input_shape=4,
        report=quiet,
    )
    assert list(mine.state_dict()) == list(before)
    for key, value in mine.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(isinstance(module, OffsetLayer) for module in mine.modules())


def test_neither_a_step_nor_the_end_changes_the_network_that_was_given() -> None:
    module = WithKAN().eval()
    network = describe_network(module, read_inputs("3", None))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    list(prune_further(network, [0.0, 0.1, 0.3]))
    prune_network(network, 0.1)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(type(layer) is KANLinear for layer in module.head.layers)


def test_a_network_may_still_ask_its_layers_what_they_are() -> None:
    layer = OffsetLayer(KANLinear(3, 2), torch.zeros(2))
    assert (layer.in_features, layer.out_features) == (3, 2)
    assert layer.scaled_spline_weight.shape == (2, 3, 8)
    with pytest.raises(AttributeError):
        layer.no_such_thing  # noqa: B018


def test_a_kan_with_means_is_proven_as_a_kan_is() -> None:
    x = rows_with_a_constant(4)
    found, written, _ = prune_network(network_of(uneven([4, 6, 2]), x), 0.0)
    assert found is written
    assert found.kan is not None
    assert [type(layer) for layer in found.kan.layers] == [OffsetLayer, KANLinear]
    assert isinstance(found.kan, KAN)
