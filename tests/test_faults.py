"""Files with a single fault are refused: some of those of `python -m tests.faults`."""

import pytest

from kan_bundle.manifest import Precision
from tests.faults import try_faults


@pytest.mark.parametrize(
    ("subject", "precision", "most"), [("two outputs", "fp32", 60), ("kan", "int8", 25)]
)
def test_a_fault_that_changes_an_answer_is_refused(
    subject: str, precision: Precision, most: int
) -> None:
    outcomes = list(try_faults(subject, precision, most=most))
    assert sum(outcome.effect > 2 for outcome in outcomes) >= 15
    assert [outcome.fault.what for outcome in outcomes if outcome.missed] == []
    if most == 60:  # enough for every kind
        kinds = {outcome.fault.kind for outcome in outcomes}
        assert {"knots", "weight", "node", "type", "nan", "output"} <= kinds
