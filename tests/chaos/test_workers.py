"""Random faults of workers under load: a few in every `make test`, many in `make test-chaos`."""

from pathlib import Path

import pytest

from tests.chaos.workers import run


@pytest.mark.parametrize("faults", [8, pytest.param(200, marks=pytest.mark.chaos)])
def test_workers_agree_whatever_happens_to_them(tmp_path: Path, faults: int) -> None:
    assert run(tmp_path, faults, seed=faults, report=print) == []
