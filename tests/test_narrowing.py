"""Nodes that no edge leads to or from, and files of a network without them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export import export_module, narrowing
from export.narrowing import NarrowKAN, can_be_narrowed, edges_of, find_nodes
from export.report import Report
from export.runtimes import load_onnx
from kan_model import KAN, KANLinear
from tests import oracle


def with_idle_nodes(activation: type[nn.Module] = nn.SiLU) -> KAN:
    """Of [6, 5, 4, 2]: inputs without edges; node 1 leads nowhere, nothing leads to node 2, and
    after it only node 3 of the next layer, which so is constant too."""
    torch.manual_seed(0)
    kan = KAN([6, 5, 4, 2], base_activation=activation)
    with torch.no_grad():
        for layer in kan.layers:
            nn.init.normal_(layer.spline_weight)

        def cut(layer: int, outputs: slice | int, inputs: slice | int) -> None:
            kan.layers[layer].base_weight[outputs, inputs] = 0
            kan.layers[layer].spline_weight[outputs, inputs] = 0

        cut(0, slice(None), slice(2, None))
        cut(1, slice(None), 1)
        cut(0, 2, slice(None))
        for i in (0, 1, 3, 4):
            cut(1, 3, i)
    return kan.eval()


def test_idle_nodes_are_found() -> None:
    nodes = find_nodes(with_idle_nodes())
    assert [kept.tolist() for kept in nodes.kept] == [
        [True, True, False, False, False, False],
        [True, False, False, True, True],
        [True, True, True, False],
        [True, True],
    ]
    assert nodes.removed == (4, 2, 1, 0)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, nn.Identity])
def test_a_network_without_idle_nodes_computes_the_same(activation: type[nn.Module]) -> None:
    kan = with_idle_nodes(activation=activation)
    narrow = NarrowKAN(kan, find_nodes(kan)).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    expected = kan.double()(x)
    torch.testing.assert_close(narrow(x), expected, rtol=1e-6, atol=1e-6)  # offsets are float32
    assert [layer.base_weight.shape for layer in narrow.layers] == [(3, 2), (3, 3), (2, 3)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_in_an_input_without_edges_still_shows(value: float) -> None:
    kan = with_idle_nodes()
    narrow = NarrowKAN(kan, find_nodes(kan))
    x = torch.zeros(3, 6)
    x[1, 5] = value
    assert kan(x).isnan().all(dim=1).tolist() == [False, True, False]
    assert narrow(x).isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize(("idle", "removed"), [(1, 0), (10, 0), (11, 11)])
def test_inputs_without_edges_stay_unless_they_are_most(idle: int, removed: int) -> None:
    """To take out the others one by one would cost more."""
    kan = KAN([20, 3, 2])
    with torch.no_grad():
        kan.layers[0].base_weight[:, :idle] = 0
        kan.layers[0].spline_weight[:, :idle] = 0
    assert find_nodes(kan).removed == (removed, 0, 0)


def test_files_are_narrower_and_their_tensors_are_not(tmp_path: Path, quiet: Report) -> None:
    kan = with_idle_nodes()
    done = export_module(kan, name="m", output=tmp_path, prune=0.0, report=quiet)
    assert done.pruning is not None
    assert done.pruning.nodes_removed == (4, 2, 1, 0)
    assert done.pruning.change.largest == 0
    assert [(layer.in_features, layer.out_features) for layer in done.layers] == [
        (2, 3),
        (3, 3),
        (3, 2),
    ]
    assert done.inputs[0].shape == (-1, 6)
    assert done.input_range is not None
    assert len(done.input_range.low) == 6
    session = load_onnx(tmp_path / "m" / "1" / "model.onnx", fused=True)
    x = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    x[3, 5] = np.nan
    state = {key: value.double().numpy() for key, value in kan.state_dict().items()}
    expected = oracle.kan(state, np.delete(x, 3, axis=0), oracle.silu)
    found = session([x])[0]
    assert np.isnan(found[3]).all()
    found = np.delete(found, 3, axis=0)
    assert (np.abs(found - expected) <= 1e-5 * np.maximum(1, np.abs(expected))).all()


def test_a_users_own_activation_may_know_its_channels_and_keeps_them_all() -> None:
    assert not can_be_narrowed(KAN([3, 2], base_activation=nn.PReLU))
    assert can_be_narrowed(KAN([3, 2], base_activation=nn.Tanh))


def test_a_staircase_that_answers_infinity_with_a_number_is_left_as_it_is(
    tmp_path: Path, quiet: Report
) -> None:
    torch.manual_seed(0)
    kan = KAN([6, 3, 2], spline_order=0, base_activation=nn.Tanh)
    with torch.no_grad():
        kan.layers[0].base_weight[:, :4] = 0
        kan.layers[0].spline_weight[:, :4] = 0
    assert not can_be_narrowed(kan)
    done = export_module(kan, name="m", output=tmp_path, prune=0.0, report=quiet)
    assert done.pruning is not None
    assert done.pruning.nodes_removed is None
    x = np.zeros((2, 6), np.float32)
    x[1, 0] = np.inf
    found = load_onnx(tmp_path / "m" / "1" / "model.onnx")([x])[0]
    np.testing.assert_allclose(found, kan(torch.from_numpy(x)).detach().numpy(), rtol=1e-5)
    assert np.isfinite(found).all()


def test_only_the_columns_of_constant_nodes_are_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[tuple[int, ...]] = []
    take = narrowing._some_of

    def note(layer: KANLinear, inputs: torch.Tensor, outputs: torch.Tensor) -> KANLinear:
        some = take(layer, inputs, outputs)
        copied.append(tuple(some.base_weight.shape))
        return some

    monkeypatch.setattr(narrowing, "_some_of", note)
    find_nodes(KAN([6, 5, 4, 2]))
    assert not copied
    nodes = find_nodes(with_idle_nodes())
    assert copied == [(4, 1), (2, 1)]  # node 2 after the first layer, node 3 after the second
    kan = with_idle_nodes().double()
    x = torch.zeros(1, 5, dtype=torch.float64)
    kan.layers[1].base_weight.data[:, [0, 1, 3, 4]] = 0
    kan.layers[1].spline_weight.data[:, [0, 1, 3, 4]] = 0
    torch.testing.assert_close(nodes.offsets[1], kan.layers[1](x)[0].detach(), rtol=0, atol=1e-12)


def test_edges_are_found_a_few_outputs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kan = with_idle_nodes()
    whole = [edges_of(layer) for layer in kan.layers]
    for layer, there in zip(kan.layers, whole, strict=True):
        expected = (layer.base_weight != 0) | (layer.scaled_spline_weight != 0).any(dim=-1)
        assert torch.equal(there, expected)
    monkeypatch.setattr("export.narrowing._BUDGET", 1)
    for layer, there in zip(kan.layers, whole, strict=True):
        assert torch.equal(edges_of(layer), there)
