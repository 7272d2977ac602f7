"""What is asked, of which repository; and the table at the end."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from export import export_checkpoint
from export.report import Report
from tests.chaos import table
from tests.chaos.load import Load, Question, Tally
from tests.chaos.table import Row
from tests.conftest import ROOT, STATE_DICTS

_ROWS = pytest.StashKey[list[Row]]()

Record = Callable[[str, str, Load], Tally]
"""Takes the name of a fault, that of a way, and the load that was under way; gives its tally."""


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Has a row in the table, and sees that no answer was wrong."""
    rows = request.config.stash.setdefault(_ROWS, [])

    def add(fault: str, way: str, load: Load) -> Tally:
        tally = load.tally()
        rows.append(Row(fault, way, tally))
        assert tally.requests > 0
        assert tally.wrong == 0, tally
        return tally

    return add


@pytest.fixture
def unnoticed(record: Record) -> Record:
    """As `record`, and sees that no request has failed either."""

    def add(fault: str, way: str, load: Load) -> Tally:
        tally = record(fault, way, load)
        assert tally.failed == {}, load.messages
        return tally

    return add


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(_ROWS, [])
    if rows and config.option.markexpr == "chaos":
        folder = ROOT / "build" / "chaos"
        table.write(rows, folder)
        terminalreporter.section("what clients saw")
        terminalreporter.write_line(table.markdown(rows))
        terminalreporter.write_line(f"also in {folder.relative_to(ROOT)}")


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    """What upstream's own models were asked, and said in float64."""
    return [Question(golden.name, golden.x, {"": golden.y64}) for golden in STATE_DICTS]


@pytest.fixture(scope="session")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Question]:
    """A second version of a golden whose every answer is twice the first's, to the last bit.

    A network is linear in the weights of its last layer, and float64 doubles without rounding.
    """
    golden = STATE_DICTS[0]
    state = torch.load(golden.checkpoint, weights_only=True)
    last = f"layers.{len(golden.widths) - 2}."
    for name in ("base_weight", "spline_weight"):
        state[last + name] *= 2
    root = tmp_path_factory.mktemp("doubled")
    torch.save(state, root / f"{golden.name}.pt")
    report = Report(Console(file=io.StringIO()))
    checkpoint = root / f"{golden.name}.pt"
    export_checkpoint(
        checkpoint, output=root, version=2, activation=golden.activation, report=report
    )
    versions = {"1": golden.y64, "2": 2 * golden.y64}
    return root / golden.name / "2", Question(golden.name, golden.x, versions)


@pytest.fixture
def own_repository(repository: Path, tmp_path: Path) -> Path:
    """A copy of the repository that may be changed."""
    return Path(shutil.copytree(repository, tmp_path / "own"))
