"""The fused operator against the recursion in float64, on every set of instructions there is."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import kan_ops
from tests.operators import (
    ACTIVATIONS,
    ALL_INSTRUCTIONS,
    BASIS,
    INSTRUCTIONS,
    Array,
    Operator,
    make_knots,
    recursion,
    run,
    session,
)

each = pytest.mark.parametrize("instructions", INSTRUCTIONS)


def make_operator(
    features: int = 5,
    outputs: int = 7,
    grid_size: int = 5,
    order: int = 3,
    *,
    adapted: bool = True,
    seed: int = 0,
    **attributes: int | float | str,
) -> Operator:
    rng = np.random.default_rng(seed)
    return Operator(
        order,
        make_knots(features, grid_size, order, adapted=adapted, rng=rng),
        rng.standard_normal((grid_size + order + 1, features, outputs)).astype(np.float32),
        **attributes,  # type: ignore[arg-type]
    )


def make_rows(operator: Operator, rows: int, seed: int, *, special: bool = False) -> Array:
    """Make rows around the grid, with every fifth number exactly a knot, and some beyond."""
    rng = np.random.default_rng(seed)
    count, features = operator.knots.shape
    x: Array = (rng.standard_normal((rows, features)) * rng.choice([0.3, 1, 3])).astype(np.float32)
    at = rng.random(x.shape) < 0.2
    x[at] = operator.knots[rng.integers(count, size=at.sum()), np.where(at)[1]]
    far = rng.random(x.shape) < 0.02
    most = 3e38 if operator.activation == "tanh" else 1e30  # times a weight it is a number too
    x[far] = rng.choice([most, -most], far.sum())
    if special:
        x[rng.random(x.shape) < 0.02] = rng.choice([np.nan, np.inf, -np.inf])
    return x


def assert_right(found: Array, operator: Operator, x: Array) -> None:
    expected, allowed = operator.answers(x)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    known = ~np.isnan(expected)
    assert found.shape == expected.shape
    assert (np.abs(found - expected)[known] <= allowed[known] + 1e-30).all()


def test_the_library_is_built_and_the_processors_best_instructions_run() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    wanted = {"portable"}
    wanted |= {"avx2"} if " avx2 " in flags and " fma " in flags else set()
    if all(f" {flag} " in flags for flag in ("avx512f", "avx512bw", "avx512vl", "avx512dq")):
        wanted |= {"avx512"} | ({"avx512vbmi2"} if " avx512_vbmi2 " in flags else set())
    assert set(INSTRUCTIONS) == wanted


@each
@settings(max_examples=40)
@given(data=st.data())
def test_any_layer_is_right(instructions: str, data: st.DataObject) -> None:
    order = data.draw(st.integers(1, 5), "order")
    grid_size = data.draw(st.sampled_from([1, 2, 3, 5, 7, 8, 13, 20, 31, 60, 100]), "grid size")
    operator = make_operator(
        data.draw(st.integers(1, 140), "features"),
        data.draw(
            st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 33, 63, 64, 65, 100, 300]), "outputs"
        ),
        grid_size,
        order,
        adapted=data.draw(st.booleans(), "adapted"),
        seed=data.draw(st.integers(0, 1000), "seed"),
        groups=data.draw(st.integers(1, grid_size + order), "groups"),
        scale=data.draw(st.sampled_from([1.0, 4 / 3, 0.3]), "scale"),
        activation=data.draw(st.sampled_from(kan_ops.ACTIVATIONS), "activation"),
    )
    rows = data.draw(st.sampled_from([1, 2, 11, 12, 16, 31, 32, 64, 127, 128, 129, 257]), "rows")
    x = make_rows(operator, rows, operator.functions, special=data.draw(st.booleans(), "special"))
    threads = data.draw(st.integers(1, 4), "threads")
    assert_right(run(operator.model(), x, instructions, threads), operator, x)


@each
@pytest.mark.parametrize("rows", [1, 200], ids=["a row", "many rows"])
@pytest.mark.parametrize("adapted", [False, True], ids=["uniform", "adapted"])
@pytest.mark.parametrize("order", kan_ops.ORDERS)
@pytest.mark.parametrize("grid_size", [5, 20, 64])
def test_the_functions_are_within_2e_7(
    instructions: str, order: int, grid_size: int, adapted: bool, rows: int
) -> None:
    """Each function is an output of its own; also at the knots, and one float to either side."""
    rng = np.random.default_rng(order)
    knots = make_knots(1, grid_size, order, adapted=adapted, rng=rng)
    count = grid_size + order
    weights = np.concatenate([np.eye(count), np.zeros((1, count))]).astype(np.float32)
    operator = Operator(order, knots, weights[:, None], activation="relu")
    sides = [np.nextafter(knots, np.float32(side), dtype=np.float32) for side in (-np.inf, np.inf)]
    inside = rng.uniform(knots[0] - 0.1, knots[-1] + 0.1, (20_000 if rows > 1 else 200, 1))
    x = np.concatenate([knots, *sides, inside]).astype(np.float32)
    loaded = session(operator.model(), instructions)
    parts = [loaded.run(None, {"x": x[i : i + rows]})[0] for i in range(0, len(x), rows)]
    exact = recursion(x.astype(np.float64), knots.astype(np.float64), order)[..., 0]
    assert np.abs(np.concatenate(parts) - exact).max() <= BASIS


@each
@pytest.mark.parametrize("rows", [1, 4000], ids=["a row", "many rows"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_base_path_is_as_exact_as_float32_allows(
    instructions: str, activation: str, rows: int
) -> None:
    operator = Operator(
        1,
        make_knots(1, 1, 1, adapted=False, rng=np.random.default_rng()),
        np.array([0, 0, 1], np.float32)[:, None, None],
        activation=activation,
    )
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-12, 12, 3000), 10.0 ** rng.uniform(-30, 30, 1000)])
    x = (x * rng.choice([-1, 1], x.shape)).astype(np.float32)[: None if rows > 1 else 300, None]
    loaded = session(operator.model(), instructions)
    parts = [loaded.run(None, {"x": x[i : i + rows]})[0] for i in range(0, len(x), rows)]
    exact = ACTIVATIONS[activation](x.astype(np.float64))
    assert (np.abs(np.concatenate(parts) - exact) <= 5e-7 * np.abs(exact) + 1e-35).all()


@each
@pytest.mark.parametrize("rows", [1, 256], ids=["streamed", "grouped"])
def test_sums_round_no_more_than_a_float32_product(instructions: str, rows: int) -> None:
    operator = make_operator(64, 48, grid_size=20)
    x = np.random.default_rng(1).uniform(-1, 1, (256, 64)).astype(np.float32)
    exact, _ = operator.answers(x)
    columns = torch.from_numpy(operator.columns(x).astype(np.float32)).flatten(1)
    product = (columns @ torch.from_numpy(operator.weights).flatten(0, 1)).numpy()
    runner = session(operator.model(), instructions)
    found = [runner.run(None, {"x": x[i : i + rows]})[0] for i in range(0, len(x), rows)]
    # The product knows its columns to the last digit: 0.8 to 1.0 of its noise were seen, and 1.9
    # when all terms of all inputs go into one sum.
    assert noise(np.concatenate(found) - exact) <= 1.25 * noise(product - exact)


def noise(error: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(error**2)))


@each
@pytest.mark.parametrize("rows", [1, 40])
def test_nan_and_infinity_spoil_their_row_and_no_other(instructions: str, rows: int) -> None:
    operator = make_operator(20)
    x = make_rows(operator, rows + 3, 0)
    for row, value in enumerate((np.nan, np.inf, -np.inf)):
        x[row, row] = value
    found = run(operator.model(), x, instructions)
    assert np.isnan(found[:3]).all()
    assert not np.isnan(found[3:]).any()


@each
@pytest.mark.parametrize("rows", [1, 40])
def test_the_largest_numbers_are_outside_the_grid_and_no_more(instructions: str, rows: int) -> None:
    operator = make_operator(4, grid_size=50, activation="tanh")
    signs = np.array([1, -1, 1, -1], np.float32)
    x = np.full((rows, 4), 3e38, np.float32) * signs
    found = run(operator.model(), x, instructions)
    expected = signs.astype(np.float64) @ operator.weights[-1]
    np.testing.assert_allclose(found, np.tile(expected, (rows, 1)), rtol=1e-5)


@each
def test_no_rows_are_no_rows(instructions: str) -> None:
    assert run(make_operator().model(), np.zeros((0, 5), np.float32), instructions).shape == (0, 7)


@each
def test_numbers_that_lie_anywhere_in_memory(instructions: str) -> None:
    operator = make_operator(33, 65)
    x = make_rows(operator, 50, 1)
    raw = np.zeros(4 * x.size + 64, np.uint8)
    loaded = session(operator.model(), instructions)
    for offset in (4, 12, 36):
        moved = raw[offset : offset + 4 * x.size].view(np.float32).reshape(x.shape)
        moved[:] = x
        assert_right(loaded.run(None, {"x": moved})[0], operator, x)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("outputs", [3, 64, 700])
def test_any_number_of_threads_gives_right_answers(threads: int, outputs: int) -> None:
    operator = make_operator(150, outputs)
    x = make_rows(operator, 333, 0)
    found = run(operator.model(), x, threads=threads)
    assert_right(found, operator, x)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_runs_in_several_threads_at_once(threads: int) -> None:
    operator = make_operator(100, 70)
    loaded = session(operator.model(), threads=threads)
    batches = [make_rows(operator, rows, rows) for rows in (1, 5, 40, 200, 300)]
    expected = [loaded.run(None, {"x": x})[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: loaded.run(None, {"x": batches[i % 5]})[0], range(300)))
    for i, answers in enumerate(found):
        np.testing.assert_array_equal(answers, expected[i % 5])


@pytest.mark.parametrize(
    "attributes",
    [
        {"order": 0},
        {"order": 6},
        {"grid_size": 0},
        {"grid_size": 2**40},
        {"groups": 0},
        {"groups": 99},
        {"scale": 0.0},
        {"scale": float("nan")},
        {"activation": "mish"},
        {"activation": "silu" * 100},
    ],
    ids=lambda attributes: str(attributes)[:30],
)
def test_what_it_does_not_know_is_refused_when_a_model_is_loaded(
    attributes: dict[str, object],
) -> None:
    with pytest.raises(Exception, match="KANLinear1: an attribute has a value"):
        session(make_operator().model(**attributes))


@pytest.mark.parametrize("attributes", [{"grid_size": 6}, {"grid_size": 4}, {"order": 2}], ids=str)
def test_tensors_that_do_not_fit_are_refused(attributes: dict[str, object]) -> None:
    loaded = session(make_operator().model(**attributes))
    with pytest.raises(Exception, match="have shapes that do not fit each other"):
        loaded.run(None, {"x": np.zeros((2, 5), np.float32)})


def test_more_knots_than_needed_are_not_looked_at() -> None:
    operator = make_operator()
    beyond = np.full((4, 5), np.nan, np.float32)
    longer = Operator(3, np.concatenate([operator.knots, beyond]), operator.weights)
    x = make_rows(operator, 100, 0)
    for rows in (x, x[:3]):
        np.testing.assert_array_equal(run(longer.model(), rows), run(operator.model(), rows))


@pytest.mark.parametrize("name", ["sse9", "avx512vbmi2-please", "portable" + 99 * "!"])
def test_instructions_that_do_not_exist_are_refused(name: str) -> None:
    expected = f"expected {', '.join(ALL_INSTRUCTIONS[:3])} or {ALL_INSTRUCTIONS[3]}"
    with pytest.raises(Exception, match=expected):
        session(make_operator().model(), name)


def test_a_grid_beyond_the_largest_is_refused() -> None:
    with pytest.raises(Exception, match="an attribute has a value"):
        session(make_operator().model(grid_size=kan_ops.MAX_GRID_SIZE + 1))


def test_the_library_shows_nothing_but_its_one_function_and_needs_no_onnxruntime() -> None:
    path = kan_ops.library_path()
    assert path is not None
    symbols = _output("nm", "--dynamic", "--defined-only", path).split()
    assert symbols[2::3] == ["RegisterCustomOps"]
    needed = _output("readelf", "--dynamic", path)
    assert "onnxruntime" not in needed
    assert "libstdc++" not in needed
    assert "libpython" not in needed


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_without_the_library_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kan_ops, "_LIBRARY", "missing.so")
    assert kan_ops.library_path() is None
    with pytest.raises(FileNotFoundError, match=r"was not built .* Install one and reinstall"):
        kan_ops.register(onnxruntime.SessionOptions())


def test_the_names_here_are_the_librarys() -> None:
    """They are written twice, in Python and in C++."""
    for order in kan_ops.ORDERS:
        for activation in kan_ops.ACTIVATIONS:
            session(make_operator(order=order, activation=activation).model())
    large = make_operator(1, 1, kan_ops.MAX_GRID_SIZE)
    x = make_rows(large, 20, 0)
    assert_right(run(large.model(), x), large, x)
