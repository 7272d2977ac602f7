"""Files with a single fault are refused: some of those of `python -m tests.faults`."""

import pytest

from kan_bundle.manifest import Precision
from tests.faults import try_faults


@pytest.mark.parametrize(("subject", "precision"), [("two outputs", "fp32"), ("kan", "int8")])
def test_a_fault_that_changes_an_answer_is_refused(subject: str, precision: Precision) -> None:
    outcomes = list(try_faults(subject, precision, most=25))
    assert sum(outcome.effect > 2 for outcome in outcomes) >= 15
    assert [outcome.fault.what for outcome in outcomes if outcome.missed] == []


def test_faults_of_every_kind_are_tried() -> None:
    kinds = {outcome.fault.kind for outcome in try_faults("two outputs", "fp32", most=60)}
    assert {"knots", "weight", "node", "type", "nan", "output"} <= kinds
