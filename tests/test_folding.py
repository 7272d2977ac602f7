"""Pruned and reparametrized weights: folded where the result is known, refused with a way out."""

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from export import NetworkError, export_checkpoint, export_module
from export.report import Report
from kan_model import CheckpointError, inspect_checkpoint, load_checkpoint
from kan_model.adoption import adopt
from kan_model.folding import fold_reparametrizations
from tests import zoo
from tests.bundles import CLOSE, run_onnx
from tests.states import network_of, saved

Change = Callable[[nn.Module], object]


class Halved(nn.Module):
    """A parametrization of somebody's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Noisy(nn.Module):
    """Another weight at each call."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.rand(())


class Failing(nn.Module):
    """Works once, when it is registered."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("no")
        return weight


def pruned(layer: nn.Module) -> None:
    for name in ("base_weight", "spline_weight", "spline_scaler"):
        prune.l1_unstructured(layer, name, amount=0.4)


def pruned_twice(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "spline_weight", amount=0.3)
    prune.random_unstructured(layer, "spline_weight", amount=0.3)


def pruned_in_rows(layer: nn.Module) -> None:
    prune.ln_structured(layer, "base_weight", amount=1, n=2, dim=0)


def old_weight_norm(**options: Any) -> Change:
    return lambda layer: nn.utils.weight_norm(layer, "base_weight", **options)


def old_spectral_norm(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer, "spline_weight")


def weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer, "spline_weight")


def weight_norm_without_dimension(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer, "base_weight", dim=None)  # type: ignore[arg-type]


def spectral_norm(dim: int) -> Change:
    return lambda layer: parametrizations.spectral_norm(layer, "base_weight", dim=dim)


def pruned_and_normed(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer, "base_weight")
    prune.l1_unstructured(layer, "base_weight_v", amount=0.3)


def parametrized_and_pruned(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer, "spline_weight")
    prune.l1_unstructured(layer.parametrizations.spline_weight, "original1", amount=0.3)  # type: ignore[union-attr]


def halved(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "base_weight", Halved())


KNOWN: dict[str, Change] = {
    "prune": pruned,
    "prune twice": pruned_twice,
    "structured prune": pruned_in_rows,
    "weight_norm hook": old_weight_norm(),
    "weight_norm hook of dimension 1": old_weight_norm(dim=1),
    "weight_norm hook of the whole": old_weight_norm(dim=None),
    "spectral_norm hook": old_spectral_norm,
    "weight_norm": weight_norm,
    "weight_norm of the whole": weight_norm_without_dimension,
    "spectral_norm": spectral_norm(0),
    "spectral_norm of dimension 1": spectral_norm(1),
    "prune of weight_norm": pruned_and_normed,
    "prune of a parametrization": parametrized_and_pruned,
}


def network(change: Change, widths: list[int], module: Any = zoo.KAN) -> Any:
    """Change every layer, train it a little, and leave it as training does."""
    torch.manual_seed(0)
    made = module(widths)
    for layer in made.layers:
        change(layer)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        made(torch.randn(16, widths[0])).square().mean().backward()
        optimizer.step()
    made.eval()
    with torch.no_grad():
        made(torch.randn(16, widths[0]))  # hooks compute from what they find, each for the next
        made(torch.randn(16, widths[0]))
    return made


def outputs(module: nn.Module, width: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1.2, 1.2, 30 * width).reshape(30, width)
    with torch.no_grad():
        return x, module(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("widths", [[4, 3, 2], [4, 4, 4]], ids=["narrowing", "square"])
@pytest.mark.parametrize("case", KNOWN)
def test_a_state_dict_gives_what_the_trained_network_gives(
    tmp_path: Path, case: str, widths: list[int]
) -> None:
    made = network(KNOWN[case], widths)
    x, expected = outputs(made)
    found = load_checkpoint(saved(tmp_path, made.state_dict()))(x)
    # The same weights, in a sum of another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("case", [*KNOWN, "a function of its own"])
def test_a_folded_module_gives_the_same_numbers_and_its_layers_are_adopted(case: str) -> None:
    made = network(KNOWN.get(case, halved), [4, 3, 2])
    x, expected = outputs(made)
    assert adopt(made.layers[0]) is None or made.layers[0]._forward_pre_hooks
    names = fold_reparametrizations(made)
    assert {name.partition(".")[0] for name in names} == {"layers"}
    assert torch.equal(made(x), expected)
    for layer in made.layers:
        assert type(layer) is zoo.KANLinear
        assert not layer._forward_pre_hooks
        assert adopt(layer) is not None
    assert not any("_orig" in name or "parametrizations" in name for name in made.state_dict())
    assert fold_reparametrizations(made) == {}


@pytest.mark.parametrize("function", [Noisy, Failing])
def test_a_parametrization_that_is_no_constant_is_left_as_it_is(function: Any) -> None:
    layer = zoo.KANLinear(4, 3).eval()
    parametrize.register_parametrization(layer, "base_weight", function(), unsafe=True)
    assert fold_reparametrizations(layer) == {}
    assert parametrize.is_parametrized(layer, "base_weight")


@pytest.mark.parametrize("change", [halved, lambda layer: prune.identity(layer, "base_weight")])
def test_a_parameter_that_another_layer_shares_keeps_its_values_there(change: Change) -> None:
    first, second = zoo.KANLinear(4, 4), zoo.KANLinear(4, 4)
    second.base_weight = first.base_weight
    both = nn.Sequential(first, second).eval()
    change(first)
    if hasattr(first, "base_weight_mask"):
        first.base_weight_mask[0] = 0  # type: ignore[operator]
    both(torch.zeros(1, 4))
    x, expected = outputs(both)
    fold_reparametrizations(both)
    assert torch.equal(both(x), expected)


def test_a_module_of_which_a_copy_is_folded_still_has_its_parametrizations() -> None:
    network = nn.Linear(4, 3)
    parametrizations.weight_norm(network)
    parametrize.register_parametrization(network, "bias", Halved())
    x = torch.randn(5, 4)
    expected = network(x)
    folded = copy.deepcopy(network)
    assert set(fold_reparametrizations(folded)) == {"weight", "bias"}
    torch.testing.assert_close(network(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=0)


def test_frozen_weights_stay_parameters() -> None:
    layer = zoo.KANLinear(4, 3).eval()
    weight_norm(layer)
    layer.requires_grad_(False)
    fold_reparametrizations(layer)
    assert not dict(layer.named_parameters())["spline_weight"].requires_grad


@pytest.mark.filterwarnings("ignore:.*base activation was trained")
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "case", ["prune", "weight_norm hook", "spectral_norm hook", "prune of weight_norm"]
)
def test_a_pickled_module_is_read_without_running_it_and_with_running_it(
    tmp_path: Path, case: str
) -> None:
    made = network(KNOWN[case], [4, 3, 2])
    made.layers[0].base_activation = nn.GELU()
    path = saved(tmp_path, made)
    x, expected = outputs(made)
    torch.testing.assert_close(load_checkpoint(path)(x), expected, rtol=1e-5, atol=1e-6)
    trusted, text = network_of(path, trust_pickle=True)
    assert "is folded into layers.0" in text
    assert all(adopt(layer) is not None for layer in trusted.layers)  # type: ignore[union-attr]
    assert torch.equal(trusted(x), expected)


def test_a_module_in_memory_is_exported_fused_and_stays_as_it_is(tmp_path: Path) -> None:
    made = network(pruned, [4, 3, 2])
    made.train()
    x, expected = outputs(made)
    before = copy.deepcopy(made.state_dict())
    stream = io.StringIO()
    report = Report(Console(file=stream, width=300, highlight=False))
    manifest = export_module(made, name="m", output=tmp_path, report=report)
    assert [layer.name for layer in manifest.layers] == ["layers.0", "layers.1"]
    text = stream.getvalue()
    assert text.count("torch.nn.utils.prune is folded into layers.0.spline_scaler") == 1
    assert "warning" not in text
    np.testing.assert_allclose(
        run_onnx(tmp_path / "m" / "1", x.numpy())[0], expected.numpy(), **CLOSE
    )
    after = made.state_dict()
    assert made.training
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("in_network", [True, False])
@pytest.mark.parametrize("in_file", [True, False])
def test_either_side_may_hold_a_pruned_network_of_which_the_other_holds_the_weights(
    tmp_path: Path, in_file: bool, in_network: bool
) -> None:
    made = network(pruned, [4, 3, 2])
    x, expected = outputs(made)
    if not in_file:
        fold_reparametrizations(made)

    def factory() -> nn.Module:
        other = zoo.KAN([4, 3, 2])
        if in_network:
            for layer in other.layers:
                pruned(layer)
        return other

    path = saved(tmp_path, {"state_dict": {f"net.{k}": v for k, v in made.state_dict().items()}})
    found, text = network_of(path, model=factory)
    assert torch.equal(found(x), expected)
    assert all(adopt(layer) is not None for layer in found.layers)  # type: ignore[union-attr]
    assert text.count("prune is folded into") == int(in_file or in_network)


@pytest.mark.filterwarnings("ignore:.*base activation was trained")
def test_an_unknown_parametrization_is_refused_and_each_remedy_exports(tmp_path: Path) -> None:
    made = network(halved, [4, 3, 2])
    x, expected = outputs(made)
    path = saved(tmp_path, made.state_dict())
    with pytest.raises(
        CheckpointError,
        match=r"layers\.0\.parametrizations\.base_weight\.original: .* function that is not in the "
        r"file; call torch\.nn\.utils\.parametrize\.remove_parametrizations\(layer, 'base_weight'\)"
        r".*--model package\.module:factory",
    ) as error:
        export_checkpoint(path, output=tmp_path)
    assert "state_dict()" not in str(error.value)
    assert "remove_parametrizations" in str(inspect_checkpoint(path).refused)

    def factory() -> nn.Module:
        other = zoo.KAN([4, 3, 2])
        for layer in other.layers:
            halved(layer)
        return other

    with pytest.raises(NetworkError, match="remove_parametrizations"):
        export_checkpoint(path, output=tmp_path, model=lambda: zoo.KAN([4, 3, 2]), input_shape="4")
    manifest = export_checkpoint(path, output=tmp_path, model=factory, input_shape="4")
    assert len(manifest.layers) == 2
    for layer in made.layers:
        parametrize.remove_parametrizations(layer, "base_weight")
    export_checkpoint(saved(tmp_path, made.state_dict()), output=tmp_path)
    for version in ("1", "2"):
        found = run_onnx(tmp_path / "model" / version, x.numpy())[0]
        np.testing.assert_allclose(found, expected.numpy(), **CLOSE)


def test_vectors_that_fit_no_dimension_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = zoo.KANLinear(4, 4)
    nn.utils.spectral_norm(layer, "base_weight")  # its vectors are random before training
    with pytest.raises(CheckpointError, match=r"call torch\.nn\.utils\.remove_spectral_norm"):
        load_checkpoint(saved(tmp_path, layer.state_dict()))


BAD_PARTS: dict[str, tuple[Tensor, str]] = {
    "other shape": (torch.ones(2, 3), r"spline_weight_mask \(2, 3\).*prune\.remove"),
    "sparse": (torch.ones(3, 4, 8).to_sparse(), "expected a dense tensor, found a sparse one"),
    "larger than its file": (
        torch.ones(1).expand(3 * 10**9, 4, 8),
        r"spline_weight_mask: shape .* is \d+ bytes, the file has",
    ),
    "not finite": (torch.full((3, 4, 8), float("nan")), "values are not finite"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_a_mask_that_cannot_be_applied_is_named(tmp_path: Path, case: str) -> None:
    mask, message = BAD_PARTS[case]
    layer = zoo.KANLinear(4, 3)
    prune.identity(layer, "spline_weight")
    path = saved(tmp_path, dict(layer.state_dict()) | {"spline_weight_mask": mask})
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert re.search(message, str(inspect_checkpoint(path).refused))


def test_a_pickled_scaler_that_is_switched_off_is_not_applied_when_it_is_pruned(
    tmp_path: Path,
) -> None:
    made = network(pruned, [4, 2])
    made.layers[0].enable_standalone_scale_spline = False
    x, expected = outputs(made)
    found = load_checkpoint(saved(tmp_path, made))(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
