"""`--strict`: what there is a warning of is refused, with every warning, and nothing is written."""

from pathlib import Path

import numpy as np
import pytest

from export import WarningsError, export_checkpoint, export_module
from export.report import Report
from kan_model import KAN
from tests.conftest import GOLDENS, run_export
from tests.edges import uneven, within

UNIFORM = GOLDENS / "uniform_4x8x3.pt"


def test_a_warning_is_a_refusal_with_its_text(tmp_path: Path) -> None:
    done = run_export(UNIFORM, "--output", tmp_path / "models", "--strict")
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the file does not say which base activation was trained")
    assert "--strict" in last
    assert list(tmp_path.iterdir()) == []


def test_all_warnings_are_listed(tmp_path: Path, quiet: Report) -> None:
    x = within(uneven([4, 8, 3]), 20)
    x[3, 1] = np.nan
    with pytest.raises(WarningsError) as refused:
        export_checkpoint(UNIFORM, output=tmp_path, samples=x, prune=0.1, strict=True, report=quiet)
    told = str(refused.value)
    assert "3 warnings" in told
    for line, start in enumerate(("the file does not say", "pruned: this", "samples input: 1"), 1):
        assert f"  {line}. {start}" in told
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_would_be_kept_is_found_before_anything_is_published(
    tmp_path: Path, quiet: Report
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text("ours")
    with pytest.raises(WarningsError, match="differs from what this version needs"):
        export_module(KAN([3, 2]), name="m", output=tmp_path, strict=True, report=quiet)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["config.pbtxt"]


def test_without_warnings_it_changes_nothing(tmp_path: Path) -> None:
    done = export_module(KAN([3, 2]), name="m", output=tmp_path, strict=True)
    assert (tmp_path / "m" / str(done.version) / "manifest.json").is_file()


def test_python_gets_the_error_and_not_the_warnings_one_by_one(tmp_path: Path) -> None:
    """Warnings are errors in this process, and the first would hide the others."""
    with pytest.raises(WarningsError, match="silu is ASSUMED"):
        export_checkpoint(UNIFORM, output=tmp_path, strict=True)


def test_inspect_has_nothing_to_be_strict_about() -> None:
    done = run_export("inspect", UNIFORM, "--strict")
    assert done.returncode == 2
    assert "leave out --strict" in done.stderr
