"""What is learned of how long runs take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.pace import Pace


@given(
    fixed=st.floats(0, 1),
    per_row=st.floats(1e-6, 1),
    rows=st.lists(st.integers(1, 100), min_size=2, max_size=50),  # older ones are forgotten
)
def test_the_pace_of_runs_is_learned(fixed: float, per_row: float, rows: list[int]) -> None:
    pace = Pace()
    for n in rows:
        pace.learn(n, fixed + per_row * n)
    if len(set(rows)) > 1:
        assert pace.expect(50) == pytest.approx(fixed + per_row * 50, rel=1e-3)
        assert pace.expect(200, runs=4) == pytest.approx(4 * fixed + per_row * 200, rel=1e-3)
    else:
        assert pace.expect(rows[0]) == pytest.approx(fixed + per_row * rows[0])
        assert pace.expect(100) <= (fixed + per_row * 100) * (1 + 1e-9)  # rounded, as sums are
