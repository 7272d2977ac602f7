"""The commands that the end of an export prints work as printed, in a shell, against a server."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import spelling
from tests import forkserver
from tests.conftest import GOLDENS, ROOT, run_export
from tests.edges import uneven
from tests.ports import free_port

UNIFORM = GOLDENS / "uniform_4x8x3.pt"
BIN = Path(sys.executable).parent
SCRIPT = BIN / "kan-serve"


class Several(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.kan = nn.Embedding(20, 4), uneven([4, 3])

    def forward(self, tokens: Tensor, age: Tensor) -> dict[str, Tensor]:
        y = self.kan(self.embedding(tokens).mean(1)) + age
        return {"logits": y, "size": y.square().sum(1)}


def printed(stderr: str) -> dict[str, str]:
    """The commands at the end, by what each is for."""
    lines = stderr.splitlines()
    return {
        before.strip(): line.strip()
        for before, line in pairwise(lines)
        if re.match(r"  \S", before) and line.startswith("    ") and not line.startswith("     ")
    }


def export(folder: Path, *flags: str | Path, path: str | None = None) -> dict[str, str]:
    words = ("-m", "export", *map(str, flags))
    done = subprocess.run(
        # With another PATH, a new interpreter looks for the commands there.
        forkserver.command(*words) if path is None else [sys.executable, *words],
        cwd=folder,
        env=environment(path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return printed(done.stderr)


def environment(path: str | None = None) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": os.environ["PATH"] if path is None else path,
    }


def shell(command: str, folder: Path, path: str | None = None) -> None:
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env=environment(path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "my folder"
    folder.mkdir()
    return folder


def asked(steps: dict[str, str], place: Path, path: str | None = None) -> None:
    """Run what was printed, on a free port in the place of the default one."""
    port = free_port()
    serve = f"{steps['serve it']} --grpc-port {port} --metrics-port 0"
    with subprocess.Popen(
        ["bash", "-c", f"exec {serve}"],
        cwd=place,
        env=environment(path),
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stderr is not None
            for line in server.stderr:
                if '"listening"' in line:
                    break
            for purpose, command in steps.items():
                if purpose.startswith("bring"):
                    shell(command, place, path)
            (ask,) = (command for purpose, command in steps.items() if purpose[:3] == "ask")
            shell(f"{ask} --address 127.0.0.1:{port}", place, path)
        finally:
            server.kill()
            server.communicate()


@pytest.mark.parametrize("name", ["", "input="])
def test_of_one_input(place: Path, name: str) -> None:
    np.save(place / "my rows.npy", np.zeros((3, 4), np.float32))
    np.save(place / "y.npy", np.ones(1))  # is the user's, and stays
    steps = export(place, UNIFORM, "--output", "my models", "--samples", f"{name}my rows.npy")
    asked(steps, place)
    assert np.load(place / "y-2.npy").shape == (3, 3)
    assert np.load(place / "y.npy").shape == (1,)


@pytest.mark.parametrize("archive", [False, True])
def test_of_several_inputs_and_outputs(place: Path, archive: bool) -> None:
    torch.manual_seed(0)
    torch.save(Several().state_dict(), place / "two.pt")
    tokens, age = np.arange(12).reshape(4, 3), np.linspace(0, 1, 4)[:, None]
    np.save(place / "tokens.npy", tokens)
    np.save(place / "an age.npy", age)
    np.savez(place / "x.npz", tokens=tokens, age=age)
    files = ["--samples", "tokens=tokens.npy", "--samples", "age=an age.npy"]
    if archive:
        files = ["--samples", "x.npz"]
    steps = export(place, "two.pt", "--model", "tests.test_next_steps:Several", *files)
    assert any(purpose.startswith("bring") for purpose in steps) != archive
    asked(steps, place)
    with np.load(place / "y.npz") as found:
        assert {name: array.shape for name, array in found.items()} == {
            "logits": (4, 3),
            "size": (4,),
        }
    assert (place / "x-2.npz").exists() != archive


@pytest.mark.skipif(not SCRIPT.exists(), reason="the commands are not installed")
def test_where_the_commands_are_on_path_they_are_named(place: Path) -> None:
    np.save(place / "x.npy", np.zeros((3, 4), np.float32))
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    steps = export(place, UNIFORM, "--samples", "x.npy", path=path)
    assert steps["serve it"] == "kan-serve --model-repository models"
    assert steps["ask it"].startswith("kan-client infer --model uniform_4x8x3 --input x.npy")
    asked(steps, place, path)


def test_spelling_follows_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the interpreter, on PATH, and nowhere."""
    interpreter, other = tmp_path / "a venv" / "python", tmp_path / "other"
    for folder in (interpreter.parent, other):
        folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.setenv("PATH", str(other))
    spelling.name_of.cache_clear()
    try:
        assert spelling.name_of("kan-client") == "python -m serving.client"
        assert spelling.runnable("kan-client") == f"'{interpreter}' -m serving.client"
        assert spelling.spell("see kan-export --help") == "see python -m export --help"
        for folder, command in ((other, "kan-serve"), (interpreter.parent, "kan-export")):
            (folder / command).touch(mode=0o755)
        spelling.name_of.cache_clear()
        assert spelling.name_of("kan-serve") == spelling.runnable("kan-serve") == "kan-serve"
        assert spelling.name_of("kan-export") == "kan-export"
        assert spelling.runnable("kan-export") == f"'{interpreter.parent / 'kan-export'}'"
    finally:
        spelling.name_of.cache_clear()


@pytest.mark.parametrize("words", [["--help"], ["plot", "--help"]])
def test_help_has_one_spelling(words: list[str]) -> None:
    text = run_export(*words, environment={"COLUMNS": "500"}).stdout
    spellings = [name in text for name in ("kan-export ", "python -m export ")]
    assert sum(spellings) == 1
    assert "kan-serve" in text or "python -m serving" in text or words[0] == "plot"
