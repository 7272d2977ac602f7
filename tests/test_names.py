"""A model's name, where its user gives none: derived from the file's, and reported."""

import shutil
from pathlib import Path

import pytest

from export import export_checkpoint
from kan_bundle.errors import LayoutError
from tests.conftest import GOLDENS, run_export

UNIFORM = GOLDENS / "uniform_4x8x3.pt"


@pytest.mark.parametrize(
    ("file", "name"),
    [("epoch=9-step=1000.ckpt", "epoch-9-step-1000"), ("modèle (1).pt", "modele-1")],
)
def test_a_checkpoint_of_any_file_name_is_exported_under_a_name_that_is_reported(
    tmp_path: Path, file: str, name: str
) -> None:
    shutil.copy(UNIFORM, tmp_path / file)
    done = run_export(tmp_path / file, "--output", tmp_path / "models")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/models/{name}/1\n")
    assert f"the model is named {name}, from {file}" in done.stderr


def test_a_name_of_which_nothing_is_left_is_refused_and_the_remedy_exports(tmp_path: Path) -> None:
    path = shutil.copy(UNIFORM, tmp_path / "日本.pt")
    with pytest.raises(LayoutError, match=r"from '日本': .*choose one with --name"):
        export_checkpoint(path, output=tmp_path / "models", activation="silu")
    assert not (tmp_path / "models").exists()
    manifest = export_checkpoint(path, output=tmp_path / "models", activation="silu", name="japan")
    assert manifest.name == "japan"


def test_a_given_name_is_not_changed(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="model name 'a=b'"):
        export_checkpoint(UNIFORM, output=tmp_path / "models", name="a=b")
