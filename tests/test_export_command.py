"""`python -m export`: what it prints, where, and how it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from export import tables
from export.__main__ import main
from export.errors import Ended
from kan_bundle.manifest import read_manifest
from tests import forkserver
from tests.conftest import GOLDENS, ROOT, Golden, run_export, run_module

UNIFORM = GOLDENS / "uniform_4x8x3.pt"


def test_the_command_prints_the_path_and_tells_the_story(tmp_path: Path) -> None:
    done = run_module("export", UNIFORM, "--output", tmp_path / "models", "--name", "m")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/models/m/1\n"
    for expected in (
        "layers.0: 4 -> 8, uniform grid of 5, order 3, with standalone scaler, silu",
        "silu is ASSUMED",
        "inputs lie up to 10^6 widths of the knots away, where outputs are huge",
        "write model.onnx",
        "write model.ts",
        "onnxruntime cpu",
        "onnxruntime cpu, fused",
        "torchscript",
        "equal",
        " s\n",
    ):
        assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert "def forward" not in done.stderr  # torch prints what it cannot trace
    end = done.stderr.partition("\n  model")[2]
    assert re.search(r"activation +silu, ASSUMED: if it was another, every answer is wrong", end)


def test_the_end_names_the_activation_that_was_taken(repository: Path, golden: Golden) -> None:
    manifest = read_manifest(repository / golden.name / "1")
    console = Console(width=120)
    with console.capture() as shown:
        console.print(tables.result(manifest, "models/m/1", 1.0))
    assert re.search(rf"activation +{golden.activation} *\n", shown.get())


@pytest.mark.parametrize("where", ["/dev/full", "a closed pipe"])
def test_a_stdout_that_cannot_be_written_is_told(tmp_path: Path, where: str) -> None:
    if where == "/dev/full":
        stdout = os.open(where, os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    command = forkserver.command("-m", "export", str(UNIFORM), "--output", str(tmp_path / "models"))
    done = subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(stdout)
    assert done.returncode == 1
    assert "the work is done, but stdout cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("largest", [8_000, 16_000], ids=["model.onnx", "model.ts"])
def test_a_file_that_there_is_no_room_for_ends_the_export_and_nothing_is_left(
    tmp_path: Path, largest: int
) -> None:
    """With a limit for the size of files, which torch meets as it does a full disk."""
    limited = "import resource, sys; from export.__main__ import main;"
    limited += (
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, {largest})); sys.exit(main())"
    )
    command = forkserver.command("-c", limited, str(UNIFORM), "--output", str(tmp_path / "models"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "File too large; make room, or choose another --output" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_is_the_path_and_the_manifest(tmp_path: Path) -> None:
    done = run_export(UNIFORM, "--output", tmp_path, "--activation", "silu", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert Path(summary["path"]) == tmp_path / "uniform_4x8x3" / "1"
    assert summary["manifest"]["parity"][0]["runtime"] == "eager"
    assert "ASSUMED" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(["none.pt"], 1, "none.pt: no such file", id="missing"),
        pytest.param(["."], 1, ".: expected a checkpoint file, found a folder", id="folder"),
        pytest.param(
            [str(UNIFORM), "--precision", "float16"], 2, "did you mean fp16?", id="precision"
        ),
        pytest.param([str(UNIFORM), "--activation", "swish"], 1, "'swish' is not known", id="act"),
        pytest.param([str(UNIFORM), "--name", "a/b"], 1, "model name 'a/b'", id="name"),
        pytest.param([str(UNIFORM), "--output", "/proc/none"], 1, "/proc/none: ", id="unwritable"),
        pytest.param([], 2, "required: FILE", id="no file"),
        pytest.param(
            [str(UNIFORM), "--version", "0"], 2, "expected a positive integer", id="version"
        ),
        pytest.param([str(UNIFORM), "--version", "9" * 19], 2, "18 digits", id="huge version"),
        pytest.param([str(UNIFORM), "--name", ""], 1, "model name ''", id="empty name"),
        pytest.param(
            [str(UNIFORM), "--activation", "tests.test_export:Branching"],
            1,
            "the network cannot be written as ONNX",
            id="untraceable",
        ),
        pytest.param([str(UNIFORM), "--no-such-flag"], 2, "--no-such-flag", id="flag"),
        pytest.param(
            [str(UNIFORM), "--activtion", "silu"], 2, "did you mean --activation?", id="misspelt"
        ),
        pytest.param(
            [str(UNIFORM), "--input-shape", "-1,3"],
            1,
            "expected 4 numbers in a row, as the KAN takes, found [batch, 3]",
            id="width",
        ),
    ],
)
def test_what_is_refused_gives_one_message_and_writes_nothing(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    if "--output" not in arguments:
        arguments = [*arguments, "--output", str(tmp_path / "models")]
    done = run_export(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_it_runs_without_being_installed(tmp_path: Path) -> None:
    """From a checkout, `python -m export` needs the dependencies only."""
    copy = tmp_path / "checkout"
    for package in ("export", "kan_bundle", "kan_model"):
        shutil.copytree(ROOT / package, copy / package)
    done = subprocess.run(
        [sys.executable, "-m", "export", UNIFORM, "--output", tmp_path / "models"],
        cwd=copy,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / "uniform_4x8x3" / "1" / "model.onnx").exists()


def test_an_interrupt_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    """A package in place of torch sends it in the midst of its import."""
    (tmp_path / "torch").mkdir()
    interrupt = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "torch" / "__init__.py").write_text(interrupt)
    done = run_module("export", UNIFORM, environment={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """For `main` in the tests' own process: its handlers are gone at the end."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def interrupted_network() -> nn.Module:
    signal.raise_signal(signal.SIGINT)
    raise AssertionError


def wrapping_network() -> nn.Module:
    try:
        return interrupted_network()
    except BaseException as error:
        raise RuntimeError("as some libraries do") from error


@pytest.mark.parametrize("factory", ["interrupted_network", "wrapping_network"])
@pytest.mark.usefixtures("own_handlers")
def test_an_interrupt_in_the_users_own_code_is_none_of_its_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factory: str
) -> None:
    arguments = ["--output", str(tmp_path / "models"), "--model", f"{__name__}:{factory}"]
    assert main([str(UNIFORM), *arguments]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("own_handlers")
def test_an_interrupt_that_a_library_swallows_ends_it_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallow(*_: object, **__: object) -> frozenset[str]:
        with pytest.raises(Ended):
            signal.raise_signal(signal.SIGINT)
        return frozenset()

    monkeypatch.setattr("export.pipeline.write_onnx", swallow)
    assert main([str(UNIFORM), "--output", str(tmp_path / "models")]) == 130
    assert "error: interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_of_the_foreground_leaves_a_job_of_the_background_alone(
    tmp_path: Path,
) -> None:
    """Which a shell that is not interactive starts with SIGINT ignored."""
    (tmp_path / "network.py").write_text(
        "import os, signal\nfrom kan_model import KAN\n"
        "def make():\n    os.kill(os.getpid(), signal.SIGINT)\n    return KAN([4, 8, 3])\n"
    )
    command = f"trap '' INT; exec {sys.executable} -m export"
    arguments = f"{UNIFORM} --output {tmp_path}/models --model network:make --name m"
    done = subprocess.run(
        ["sh", "-c", f"{command} {arguments}"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
