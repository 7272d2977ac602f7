from pathlib import Path

import numpy as np
import pytest

from kan_bundle.errors import IntegrityError
from kan_bundle.golden import Golden, excess, read_golden, write_golden

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
    golden = Golden(np.array([[1.0, NAN]], dtype=np.float32), np.array([[NAN]]), np.array([[1e-5]]))
    write_golden(golden, tmp_path / "golden.npz")
    found = read_golden((tmp_path / "golden.npz").read_bytes())
    for name in ("inputs", "outputs", "tolerance"):
        np.testing.assert_array_equal(getattr(found, name), getattr(golden, name))


def test_a_pickle_inside_is_not_opened(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "golden.npz",
        inputs=np.array([{}], dtype=object),
        outputs=np.zeros((1, 1)),
        tolerance=np.zeros((1, 1)),
    )
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_golden((tmp_path / "golden.npz").read_bytes())


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK\x03\x04"])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_golden(content)


def test_shapes_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_golden(
        Golden(np.zeros((2, 1), np.float32), np.zeros((3, 1)), np.zeros((3, 1))),
        tmp_path / "golden.npz",
    )
    with pytest.raises(IntegrityError, match="expected float32"):
        read_golden((tmp_path / "golden.npz").read_bytes())
