import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from export.network import Call, describe_network
from export.probes import make_kan_probes
from export.proof.eager import BATCH_SIZES, evaluate
from export.proof.parity import Measurement, choose_golden, measure, run_probes
from export.proof.reference import Reference, make_reference
from export.proof.tolerance import KAN_FACTOR, RELATIVE_TOLERANCE
from kan_bundle.golden import excess
from kan_model import KAN, load_checkpoint
from tests.conftest import Golden
from tests.oracle import kan as oracle_kan
from tests.oracle import silu

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def reference_of(network: KAN) -> Reference:
    return make_reference(describe_network(network.eval(), None))


def eager_runner(network: KAN) -> Run:
    """The network in float32, as a runtime."""
    call = Call(copy.deepcopy(network).float(), ["x"])

    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return evaluate(call, (x,), len(x)).astype(np.float32)

    return run


def measured(runtime: str, run: Run, reference: Reference) -> Measurement:
    answers = run_probes(lambda inputs: [run(inputs[0])], reference)
    return measure(runtime, answers, reference)


@pytest.fixture
def network() -> KAN:
    torch.manual_seed(0)
    return KAN([3, 4, 2]).eval()


@pytest.fixture
def reference(network: KAN) -> Reference:
    return reference_of(network)


def test_probes_hold_every_knot_and_its_neighbours(network: KAN) -> None:
    knots = network.layers[0].grid.numpy()
    inputs = make_kan_probes(knots, 3).inputs[0]
    for i in range(3):
        for knot in knots[i]:
            for wanted in (
                knot,
                np.nextafter(knot, np.float32(9)),
                np.nextafter(knot, np.float32(-9)),
            ):
                assert wanted in inputs[:, i]


def test_probes_lie_where_their_group_says(network: KAN) -> None:
    knots = network.layers[0].grid.numpy()
    probes = make_kan_probes(knots, 3)
    first, low, high, last = knots[0, [0, 3, -4, -1]]

    def of(group: str) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = probes.inputs[0][probes.groups == group]
        return rows

    assert ((of("inside") >= low) & (of("inside") <= high)).all()
    margin = of("margin")
    assert (((margin >= first) & (margin <= low)) | ((margin >= high) & (margin <= last))).all()
    beyond = (of("outside") < first) | (of("outside") > last)
    assert beyond.any(axis=1).all()
    assert np.abs(of("outside")).max() > 1e6
    assert np.isnan(of("nan")).any(axis=1).all()
    assert not np.isnan(probes.inputs[0][probes.groups != "nan"]).any()


def test_the_reference_is_the_definition_in_float64(network: KAN, reference: Reference) -> None:
    state = {k: v.double().numpy() for k, v in network.state_dict().items()}
    finite = reference.probes.groups != "nan"
    expected = oracle_kan(state, reference.probes.inputs[0][finite], silu)
    np.testing.assert_allclose(reference.outputs[finite], expected, rtol=1e-11, atol=1e-12)
    assert np.isnan(reference.outputs[~finite]).all()


def test_eager_passes_and_leaves_the_network_as_it_was(network: KAN, reference: Reference) -> None:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert measured("eager", eager_runner(network), reference).passed
    after = network.state_dict()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in after
    )


def changed_at(network: KAN, group: str, reference: Reference, change: float) -> Run:
    """A runtime that is right but for one output at one probe of a group."""
    row = int(np.flatnonzero(reference.probes.groups == group)[3])
    victim = reference.probes.inputs[0][row]

    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        y = eager_runner(network)(x)
        y[(x == victim).all(axis=1) | (np.isnan(x) & np.isnan(victim)).any(axis=1), 1] += change
        return y

    return run


@pytest.mark.parametrize("group", ["knots", "inside", "margin"])
def test_one_wrong_output_at_one_probe_fails(
    network: KAN, reference: Reference, group: str
) -> None:
    found = measured("broken", changed_at(network, group, reference, 1e-4), reference)
    assert not found.passed
    assert (found.worst.group, found.worst.output) == (group, 1)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_every_batch_size_is_tried(network: KAN, reference: Reference, batch_size: int) -> None:
    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return eager_runner(network)(x) + np.float32(0.1 * (len(x) == batch_size))

    found = measured("broken", run, reference)
    assert not found.passed
    assert found.worst.batch_size >= batch_size  # a last, smaller batch may be the one


def test_a_number_where_nan_should_be_fails(network: KAN, reference: Reference) -> None:
    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.nan_to_num(eager_runner(network)(x))

    found = measured("broken", run, reference)
    assert not found.passed
    assert found.worst.group == "nan"


def test_nan_where_a_number_should_be_fails(network: KAN, reference: Reference) -> None:
    found = measured("broken", changed_at(network, "inside", reference, float("nan")), reference)
    assert not found.passed


def test_what_is_allowed_is_what_noise_explains_and_no_more_than_the_designs(
    reference: Reference,
) -> None:
    rows = np.isin(reference.probes.groups, ("knots", "inside", "margin"))
    size = np.abs(reference.outputs[rows]).max(axis=0)
    assert (size < 1).all()
    design = RELATIVE_TOLERANCE * np.maximum(size, np.abs(reference.outputs[rows]))
    off = np.abs(reference.eager - reference.outputs).max(axis=0)[rows]
    assert (reference.tolerance[rows] <= design).all()
    assert (reference.tolerance[rows] >= KAN_FACTOR * off).all()
    assert np.median(reference.tolerance[rows] / design) < 0.2


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
def test_a_model_of_any_size_is_compared_at_its_own(size: float) -> None:
    """Outputs in units that make them small are no less right or wrong."""
    torch.manual_seed(0)
    network = KAN([4, 8, 3]).eval()
    last = network.layers[1]
    with torch.no_grad():
        last.base_weight.mul_(size)
        last.spline_weight.mul_(size)
    reference = reference_of(network)
    assert measured("eager", eager_runner(network), reference).passed
    broken = copy.deepcopy(network)
    with torch.no_grad():
        broken.layers[1].spline_weight[0, 0, 4] *= 1.01
    assert not measured("broken", eager_runner(broken), reference).passed


def test_an_activation_without_a_slope_can_be_compared() -> None:
    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x > 0.1).to(x.dtype)

    torch.manual_seed(0)
    network = KAN([2, 3, 1], base_activation=Steps).eval()
    assert measured("eager", eager_runner(network), reference_of(network)).passed


def test_probes_beyond_float32_are_left_out() -> None:
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    torch.manual_seed(0)
    network = KAN([2, 3, 3, 3, 1], base_activation=Square).eval()
    reference = reference_of(network)
    assert np.isfinite(reference.eager[:, reference.probes.groups != "nan"]).all()
    assert (reference.probes.groups == "outside").any()
    assert measured("eager", eager_runner(network), reference).passed


def test_a_staircase_whose_knots_float32_rounds_is_not_held_to_a_side() -> None:
    torch.manual_seed(0)
    network = KAN([3, 2], spline_order=0, grid_range=(-1.1, 1.3)).double().eval()
    with torch.no_grad():
        network.layers[0].grid.copy_(torch.linspace(-1.1, 1.3, 6, dtype=torch.float64))
    found = measured("eager", eager_runner(network), reference_of(network))
    assert found.max_relative < 1e-5


def test_where_eager_is_further_away_twice_its_error_is_allowed() -> None:
    """A small difference of large terms: eager's own float32 rounding exceeds the tolerance."""
    torch.manual_seed(0)
    network = KAN([64, 3]).eval()
    with torch.no_grad():
        network.layers[0].base_weight.mul_(1e3)
    reference = reference_of(network)
    off = np.abs(reference.eager - reference.outputs).max(axis=0)
    rule = RELATIVE_TOLERANCE * np.abs(reference.outputs)
    assert (off > np.maximum(RELATIVE_TOLERANCE, rule)).any()
    assert (np.nan_to_num(reference.tolerance) >= np.nan_to_num(2 * off)).all()
    assert measured("eager", eager_runner(network), reference).passed


def with_columns(network: KAN, order: NDArray[np.int64]) -> Run:
    run = eager_runner(network)
    return lambda x: run(x[:, order])


def test_any_order_of_summation_passes() -> None:
    """Two float32 runtimes that add the same terms in another order are both right."""
    torch.manual_seed(0)
    network = KAN([200, 40, 5]).eval()
    reference = reference_of(network)
    for seed in range(5):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        shuffled = copy.deepcopy(network)
        first = shuffled.layers[0]
        with torch.no_grad():
            for tensor in (first.base_weight, first.spline_weight, first.spline_scaler):
                tensor.copy_(tensor[:, order].clone())
            first.grid.copy_(first.grid[order].clone())
        found = measured("shuffled", with_columns(shuffled, order.numpy()), reference)
        assert found.passed, found.excess


def test_one_wrong_weight_of_many_fails() -> None:
    """The tolerance that noise is given is not one that a wrong weight fits into."""
    torch.manual_seed(0)
    network = KAN([200, 40, 5]).eval()
    reference = reference_of(network)
    broken = copy.deepcopy(network)
    with torch.no_grad():
        broken.layers[0].spline_weight[7, 123, 4] += 1e-2
    found = measured("broken", eager_runner(broken), reference)
    assert not found.passed


def test_the_golden_rows_come_from_every_group_and_hold(network: KAN, reference: Reference) -> None:
    golden = choose_golden(reference)
    assert np.isnan(golden.inputs[0]).any()
    assert np.abs(np.nan_to_num(golden.inputs[0])).max() > 1e3
    found = eager_runner(network)(golden.inputs[0].astype(np.float32))
    assert (excess(found, golden.outputs, golden.tolerance) <= 1).all()


def test_a_staircase_is_not_held_to_a_side_of_its_steps() -> None:
    """Order 0 jumps at hidden knots; probes that land on one are left out, the others are kept."""
    torch.manual_seed(0)
    network = KAN([2, 8, 1], spline_order=0).eval()
    with torch.no_grad():  # hidden values of exactly a knot: -0.6 is one of grid size 5
        network.layers[0].base_weight.zero_()
        network.layers[0].spline_scaler.fill_(1.0)
        network.layers[0].spline_weight.fill_(-0.3)
    reference = reference_of(network)
    total = len(make_kan_probes(network.layers[0].grid.numpy(), 0))
    assert 0 < len(reference.probes) < total
    assert measured("eager", eager_runner(network), reference).passed


@pytest.mark.parametrize("order", range(6))
def test_every_order_passes(order: int) -> None:
    torch.manual_seed(order)
    network = KAN([3, 5, 2], spline_order=order).eval()
    assert measured("eager", eager_runner(network), reference_of(network)).passed


def test_goldens_pass(golden: Golden) -> None:
    network = load_checkpoint(golden.checkpoint)
    assert measured("eager", eager_runner(network), reference_of(network)).passed
