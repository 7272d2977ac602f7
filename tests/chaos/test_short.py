"""The short form of `make test-chaos`, in every `make test`: servers restart and die under load."""

from pathlib import Path

import pytest

from tests.chaos.conftest import Record
from tests.chaos.load import Question
from tests.chaos.scenes import under_load
from tests.chaos.ways import Way, every_way


@pytest.mark.parametrize("way", every_way())
def test_no_client_sees_that_a_server_restarts_and_another_dies(
    way: Way, repository: Path, questions: list[Question], unnoticed: Record, tmp_path: Path
) -> None:
    with under_load(way, tmp_path, [repository] * 3, questions) as (servers, running):
        running.fault()
        servers[0].restart()
        running.go_on(1.0)
        running.fault()
        servers[1].kill()
    unnoticed("one restarts, another dies", way.name, running)
