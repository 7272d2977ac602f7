import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from kan_model import splines
from tests.oracle import basis_function

ORDERS = range(splines.MAX_ORDER + 1)


def random_knots(rng: np.random.Generator, features: int, grid_size: int, order: int) -> np.ndarray:
    """Rising knots with gaps between a thousandth and one."""
    gaps = rng.uniform(1e-3, 1.0, (features, grid_size + 2 * order + 1))
    return np.cumsum(gaps, axis=1) - rng.uniform(0, 4, (features, 1))


def basis64(x: np.ndarray, knots: np.ndarray, order: int) -> np.ndarray:
    return splines.b_spline_basis(torch.from_numpy(x), torch.from_numpy(knots), order).numpy()


@settings(max_examples=60, derandomize=True)
@given(
    order=st.sampled_from(ORDERS),
    grid_size=st.integers(1, 9),
    features=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_basis_is_the_cox_de_boor_recursion(
    order: int, grid_size: int, features: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    knots = random_knots(rng, features, grid_size, order)
    x = rng.uniform(knots.min() - 1, knots.max() + 1, (5, features))
    x[0] = knots[:, rng.integers(knots.shape[1])]  # exactly on a knot
    found = basis64(x, knots, order)
    expected = [
        [
            [basis_function(x[b, i], knots[i], c, order) for c in range(grid_size + order)]
            for i in range(features)
        ]
        for b in range(len(x))
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_basis_agrees_with_scipy(order: int) -> None:
    rng = np.random.default_rng(order)
    knots = random_knots(rng, 1, 7, order)[0]
    low, high = knots[order], knots[-order - 1]
    x = rng.uniform(low, high, 200)  # scipy defines its basis between the grid's ends
    found = basis64(x[:, None], knots[None], order)[:, 0]
    expected = BSpline.design_matrix(x, knots, order).toarray()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_slope_agrees_with_scipy(order: int) -> None:
    rng = np.random.default_rng(order)
    knots = random_knots(rng, 1, 7, order)[0]
    x = rng.uniform(knots[order], knots[-order - 1], 200)
    found = splines.b_spline_slope(
        torch.from_numpy(x[:, None]), torch.from_numpy(knots[None]), order
    ).numpy()[:, 0]
    for i in range(found.shape[1]):
        one = BSpline(knots, np.eye(found.shape[1])[i], order)
        expected = one.derivative()(x) if order else np.zeros_like(x)
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_partition_of_unity_between_the_ends_of_the_grid(order: int) -> None:
    rng = np.random.default_rng(order)
    knots = random_knots(rng, 3, 6, order)
    x = rng.uniform(knots[:, order], knots[:, -order - 1], (500, 3))
    np.testing.assert_allclose(basis64(x, knots, order).sum(-1), 1.0, rtol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_support_is_local(order: int) -> None:
    knots = random_knots(np.random.default_rng(order), 1, 6, order)
    x = np.linspace(knots.min() - 1, knots.max() + 1, 999)[:, None]
    found = basis64(x, knots, order)[:, 0]
    for i in range(found.shape[1]):
        outside = (x[:, 0] < knots[0, i]) | (x[:, 0] >= knots[0, i + order + 1])
        assert (found[outside, i] == 0).all()
    assert (np.count_nonzero(found, axis=1) <= order + 1).all()


def test_intervals_are_half_open() -> None:
    knots = np.array([[0.0, 1.0, 2.0]])
    x = np.array([[0.0], [np.nextafter(1.0, 0.0)], [1.0], [2.0]])
    np.testing.assert_array_equal(basis64(x, knots, 0)[:, 0], [[1, 0], [1, 0], [0, 1], [0, 0]])


@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_nan_out(order: int, value: float) -> None:
    knots = random_knots(np.random.default_rng(0), 1, 4, order)
    assert np.isnan(basis64(np.array([[value]]), knots, order)).all()


def test_uniform_knots_are_upstreams_to_the_last_bit() -> None:
    # From the published arithmetic: arange(-3, 9) * 0.4 - 1 in float32.
    step = (1.0 - -1.0) / 5
    expected = torch.arange(-3, 9) * step + -1.0
    assert torch.equal(splines.uniform_knots(2, 5, 3, (-1.0, 1.0)), expected.expand(2, -1))


@pytest.mark.parametrize("low", [-1.0, -1e-3, 0.1, 1e4, -12345.0])
@pytest.mark.parametrize("width", [1e-2, 2.0, 1e3])
@pytest.mark.parametrize("grid_size", [1, 5, 64])
def test_uniform_knots_are_found_uniform(low: float, width: float, grid_size: int) -> None:
    knots = splines.uniform_knots(3, grid_size, 3, (low, low + width))
    assert splines.is_uniform(knots).all()


def test_adapted_knots_are_not_found_uniform() -> None:
    samples = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    knots = splines.adapted_knots(samples, 5, 3, grid_eps=0.02, margin=0.01)
    assert not splines.is_uniform(knots).any()
    assert (knots.diff(dim=1) > 0).all()


def test_adapted_knots_cover_the_samples() -> None:
    samples = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    knots = splines.adapted_knots(samples, 5, 3, grid_eps=0.02, margin=0.01)
    assert (knots[:, 3] <= samples.amin(0)).all()
    assert (knots[:, -4] >= samples.amax(0)).all()


def test_fit_recovers_the_coefficients_of_a_curve() -> None:
    rng = np.random.default_rng(0)
    knots = torch.from_numpy(random_knots(rng, 2, 5, 3))
    coefficients = torch.from_numpy(rng.normal(size=(4, 2, 8)))  # (curves, in, n)
    low, high = knots[:, :1], knots[:, -1:]
    x = (low + (high - low) * torch.linspace(0, 1, 300, dtype=torch.float64)).T  # (points, in)
    y = torch.einsum("pin,cin->pic", splines.b_spline_basis(x, knots, 3), coefficients)
    found = splines.fit_coefficients(x, y, knots, 3)
    torch.testing.assert_close(found, coefficients, rtol=1e-9, atol=1e-9)


def test_no_change_of_knots_is_the_identity() -> None:
    knots = torch.from_numpy(random_knots(np.random.default_rng(0), 2, 5, 3))
    low, high = knots[:, :1], knots[:, -1:]
    x = (low + (high - low) * torch.linspace(0, 1, 300, dtype=torch.float64)).T
    found = splines.change_of_knots(x, knots, knots, 3)
    torch.testing.assert_close(found, torch.eye(8).double().expand(2, 8, 8), rtol=0, atol=1e-9)
