"""The images, each built once, and a model of digits to serve."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.digits.data import load_split
from kan_model import load_checkpoint
from tests.conftest import ROOT
from tests.containers import engine
from tests.containers.asking import Images


@pytest.fixture(scope="session")
def images() -> None:
    """Skip what needs containers where there can be none."""
    reason = engine.lacking()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def base_image(images: None) -> str:
    return engine.stand_in(engine.PYTHON_IMAGE)


@pytest.fixture(scope="session")
def cpu_image(images: None) -> str:
    return engine.build("cpu")


@pytest.fixture(scope="session")
def export_image(images: None) -> str:
    return engine.build("export")


@pytest.fixture(scope="session")
def digits() -> Path:
    """A folder with digits.pt, a trained KAN, and a model repository `models` with its export."""
    folder = ROOT / "build" / "demo"  # where `make demo` has it
    checkpoint = folder / "digits.pt"
    if not (folder / "models" / "digits").is_dir():
        for command in (
            ["examples.digits.train", "--output", checkpoint],
            ["export", checkpoint, "--output", folder / "models", "--activation", "silu"],
        ):
            subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="session")
def images_of_digits(digits: Path) -> Images:
    _, x, _, labels = load_split()
    with torch.no_grad():
        y = load_checkpoint(digits / "digits.pt")(torch.from_numpy(x)).numpy()
    return Images(x, y, labels)
