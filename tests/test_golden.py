from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kan_bundle.errors import IntegrityError
from kan_bundle.golden import Golden, excess, read_golden, side_by_side, write_golden
from kan_bundle.manifest import TensorSpec

TWO = (TensorSpec("input", "FP32", (-1, 2)),)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "expected", "ratio"),
    [
        (1.0, 1.0, 0.0),
        (1.05, 1.0, 0.5),
        (1.2, 1.0, 2.0),
        (NAN, NAN, 0.0),
        (NAN, 1.0, INF),
        (1.0, NAN, INF),
        (INF, INF, 0.0),
        (-INF, INF, INF),
        (INF, 1.0, INF),
        (1.0, INF, INF),
    ],
)
def test_excess_is_deviation_over_tolerance(found: float, expected: float, ratio: float) -> None:
    got = excess(np.array([found]), np.array([expected]), np.array([0.1]))
    np.testing.assert_allclose(got, [ratio], rtol=1e-9)


def test_a_nan_tolerance_excuses_nothing() -> None:
    assert excess(np.array([1.0]), np.array([2.0]), np.array([NAN]))[0] == INF


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    golden = Golden(
        (np.array([[1.0, NAN]], dtype=np.float32), np.array([[3]])),
        np.array([[NAN]]),
        np.array([[1e-5]]),
    )
    write_golden(golden, tmp_path / "golden.npz")
    content = (tmp_path / "golden.npz").read_bytes()
    found = read_golden(content, (*TWO, TensorSpec("index", "INT64", (-1, 1))))
    for written, read in zip(golden.inputs, found.inputs, strict=True):
        np.testing.assert_array_equal(read, written)
    np.testing.assert_array_equal(found.outputs, golden.outputs)
    np.testing.assert_array_equal(found.tolerance, golden.tolerance)


def test_outputs_stand_side_by_side() -> None:
    images, scores = np.arange(12).reshape(2, 3, 2), np.array([[-1], [-2]])
    np.testing.assert_array_equal(
        side_by_side([images, scores]), [[0, 1, 2, 3, 4, 5, -1], [6, 7, 8, 9, 10, 11, -2]]
    )


def test_a_pickle_inside_is_not_opened(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "golden.npz",
        input_0=np.array([{}], dtype=object),
        outputs=np.zeros((1, 1)),
        tolerance=np.zeros((1, 1)),
    )
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_golden((tmp_path / "golden.npz").read_bytes(), TWO)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK\x03\x04"])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_golden(content, TWO)


def test_what_inflates_without_end_is_refused(tmp_path: Path) -> None:
    zeros = np.zeros((2**20, 10))
    np.savez_compressed(tmp_path / "golden.npz", input_0=zeros, outputs=zeros, tolerance=zeros)
    with pytest.raises(IntegrityError, match=r"it holds 2516\d+ bytes, expected at most"):
        read_golden((tmp_path / "golden.npz").read_bytes(), TWO)
    many = {f"x{i}": np.zeros(1) for i in range(1001)}
    np.savez(tmp_path / "golden.npz", **many)  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="expected at most 1000 arrays"):
        read_golden((tmp_path / "golden.npz").read_bytes(), TWO)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        pytest.param(np.zeros((2, 2), np.float32), np.zeros((3, 1)), id="rows"),
        pytest.param(np.zeros((3, 4), np.float32), np.zeros((3, 1)), id="width"),
        pytest.param(np.zeros((3, 2), np.float64), np.zeros((3, 1)), id="type"),
        pytest.param(np.zeros((3, 2), np.float32), np.zeros(3), id="dimensions"),
        pytest.param(np.zeros((0, 2), np.float32), np.zeros((0, 1)), id="nothing"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    tmp_path: Path, inputs: NDArray[Any], outputs: NDArray[Any]
) -> None:
    write_golden(Golden((inputs,), outputs, np.zeros(outputs.shape)), tmp_path / "golden.npz")
    with pytest.raises(IntegrityError, match="expected at least one row and arrays"):
        read_golden((tmp_path / "golden.npz").read_bytes(), TWO)
