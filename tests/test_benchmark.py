"""The benchmark measures what it is asked to measure. How fast anything is, no test says."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import CONTENDERS, Model
from benchmarks.drawing import STYLES, draw
from benchmarks.engine import as_json, main
from benchmarks.measuring import Entry, ModelResult, Results, Timing
from tests.conftest import ROOT

ASKED = [c.name for c in CONTENDERS.values() if not c.compiles and "openvino" not in c.modules]


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    """The benchmark sets torch's number of threads, which is the whole process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_table_and_json_hold_every_contender_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--models 4x3 --grids 5 --knots adapted --batches 1 3 --rounds 1 --threads 1"
    names = [name.replace(" ", "-") for name in ASKED]
    code = main([*words.split(), "--contenders", *names, "--output", str(tmp_path)])
    assert code == 0
    table = capsys.readouterr().out
    first_cells = [line.split("|")[1].strip() for line in table.splitlines() if line[:1] == "|"]
    (model,) = json.loads((tmp_path / "engine.json").read_text())["models"]
    for name in ASKED:
        assert first_cells.count(name) == 1
        entries = [entry for entry in model["entries"] if entry["contender"] == name]
        assert [entry["batch"] for entry in entries] == [1, 3]
        assert all(held > 0 for held in model["memory"][name].values())
        for entry in entries:
            assert entry["timing"]["samples"] >= 1
            assert not entry["wrong"]
            # float32 on four inputs of size 1; what another function gives is off by 0.1 and more.
            computes = CONTENDERS[name].answers
            assert entry["error"] < 1e-5 if computes else entry["error"] is None
    assert {entry["contender"] for entry in model["entries"]} == set(ASKED)
    assert model["onnx_bytes"] > 0
    assert model["weight_bytes"] == 4 * 3 * (5 + 3 + 1) * 4
    assert "Not measured" not in table


@pytest.mark.parametrize(
    "words",
    [
        ["--models", "4"],
        ["--models", "4x0"],
        ["--batches", "many"],
        ["--contenders", "tensorflow"],
        ["--rounds", "-1"],
        ["stray"],
    ],
)
def test_a_wrong_argument_exits_with_2_and_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m benchmarks.engine")


def test_what_is_not_there_is_left_out_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = "--models 4x3 --grids 5 --knots uniform --batches 2 --rounds 1"
    asked = ["--contenders", "product", "torch.compile"]
    assert main([*words.split(), *asked, "--output", str(tmp_path)]) == 0
    line = "torch.compile: there is no C++ compiler (no-such-compiler)"
    assert f"- {line}" in capsys.readouterr().out
    assert json.loads((tmp_path / "engine.json").read_text())["skipped"] == [line]


def test_every_contender_has_a_line_of_its_own_in_the_plot() -> None:
    assert set(STYLES) == set(CONTENDERS)
    assert len({str(style) for style in STYLES.values()}) == len(STYLES)


def test_the_plot_has_a_panel_for_each_model(tmp_path: Path) -> None:
    timing = Timing(median_ms=1.0, p99_ms=1.0, samples=1)
    models = tuple(
        ModelResult(
            Model((4, 3), grid, "uniform"),
            tuple(Entry(name, batch, timing, None) for name in CONTENDERS for batch in (1, 8)),
            {},
            None,
            1,
            {1: 0.5, 8: 0.5},
        )
        for grid in (5, 20)
    )
    svg, png = draw(Results({}, {}, models, ()), tmp_path)
    assert "grid 20, uniform knots" in svg.read_text()
    assert png.stat().st_size > 10_000


def test_results_without_a_number_are_still_json() -> None:
    entry = Entry("kanserve", 1, Timing(1.0, 1.0, 1), float("nan"))
    model = ModelResult(Model((4, 3), 5, "uniform"), (entry,), {}, None, 1, {1: 1.0})
    (found,) = json.loads(as_json(Results({}, {}, (model,), ())))["models"]
    assert found["entries"][0]["error"] is None
    assert found["entries"][0]["wrong"] is True


def test_an_answer_far_from_the_model_or_not_a_number_is_wrong() -> None:
    timing = Timing(median_ms=1.0, p99_ms=1.0, samples=1)
    found = [Entry("any", 1, timing, error).wrong for error in (None, 1e-6, 0.1, float("nan"))]
    assert found == [False, False, True, True]


def test_a_folder_that_cannot_be_written_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["--quick", "--output", str(tmp_path / "file" / "below")]) == 1
    assert "error: " in capsys.readouterr().err


def test_an_onnxruntime_contender_is_measured_without_torch() -> None:
    script = (
        "import sys, benchmarks.measuring; from benchmarks.contenders import CONTENDERS;"
        "[__import__(m) for m in CONTENDERS['kanserve'].modules];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_an_interrupt_ends_it_without_a_traceback(tmp_path: Path) -> None:
    # Who runs the tests in the background ignores SIGINT, and so would what they start.
    script = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "runpy.run_module('benchmarks.engine', run_name='__main__')"
    )
    (tmp_path / "output").mkdir()
    for name in ("engine.svg", "engine.py"):
        (tmp_path / "output" / name).touch()
    words = "--models 4x3 --grids 5 --batches 1 --rounds 100000 --contenders torch.compile product"
    with subprocess.Popen(
        [sys.executable, "-c", script, *words.split(), "--output", str(tmp_path / "output")],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path), "CXX": "no-such-compiler"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            assert "no C++ compiler" in next(iter(process.stderr))  # it has begun
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted before the first model was measured" in errors
    left = [path.name for path in (tmp_path / "output").iterdir()]
    assert left == ["engine.py"]  # nothing of an earlier run, but all that is not its own
    assert not list(tmp_path.glob("kanserve-benchmark-*"))
