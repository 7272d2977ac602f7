import numpy as np
import pytest
import torch

from kan_model import KAN, KANLinear, load_checkpoint, resolve_activation
from tests.conftest import Golden


def test_upstreams_state_dicts_load_by_name_and_give_its_numbers(golden: Golden) -> None:
    state = torch.load(golden.checkpoint, weights_only=True)
    network = KAN(
        golden.widths,
        grid_size=golden.grid_size,
        spline_order=golden.order,
        base_activation=resolve_activation(golden.activation),
    )
    network.load_state_dict(state)
    assert_upstreams_numbers(network, golden)


def test_upstreams_checkpoints_load_from_their_shapes_alone(golden: Golden) -> None:
    network = load_checkpoint(golden.checkpoint, resolve_activation(golden.activation))
    assert_upstreams_numbers(network, golden)


def assert_upstreams_numbers(network: KAN, golden: Golden) -> None:
    x = torch.from_numpy(golden.x)
    with torch.no_grad():
        single = network(x).numpy()
        double = network.double()(x.double()).numpy()
    np.testing.assert_allclose(double, golden.y64, rtol=1e-12)
    # The design's tolerance for float32.
    assert (np.abs(single - golden.y64) <= 1e-5 * np.maximum(1, np.abs(golden.y64))).all()


def test_the_scaler_option_reaches_every_layer() -> None:
    network = KAN([2, 3, 1], enable_standalone_scale_spline=False)
    assert not any("spline_scaler" in key for key in network.state_dict())


def test_update_grid_in_forward_adapts_every_layer() -> None:
    torch.manual_seed(0)
    network = KAN([2, 3, 1])
    before = [layer.grid.clone() for layer in network.layers]
    network(torch.randn(200, 2), update_grid=True)
    for layer, grid in zip(network.layers, before, strict=True):
        assert not torch.equal(layer.grid, grid)


def test_regularization_is_the_sum_over_layers() -> None:
    network = KAN([2, 3, 1])
    expected = sum(layer.regularization_loss(1.0, 0.5).item() for layer in network.layers)
    assert network.regularization_loss(1.0, 0.5).item() == pytest.approx(expected)


def test_layers_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"layers\.0 gives 3 features, layers\.1 takes 4"):
        KAN.from_layers([KANLinear(2, 3), KANLinear(4, 1)])
    with pytest.raises(ValueError, match="at least an input and an output width"):
        KAN([3])
    with pytest.raises(ValueError, match="at least one layer"):
        KAN.from_layers([])
