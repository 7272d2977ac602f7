"""Files that are checkpoints, and files that are not."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from kan_model import CheckpointError, load_checkpoint
from tests.states import good, saved


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(b"hello, world", "is not a checkpoint written by torch.save", id="text"),
        pytest.param(bytes(1000), "is not a checkpoint written by torch.save", id="zeros"),
        pytest.param(b"PK\x03\x04" + bytes(100), "is damaged, truncated", id="broken archive"),
        pytest.param(b"<html>404</html>", "is not a checkpoint", id="web page"),
        pytest.param(pickle.dumps({"a": 1}), "a pickle that torch.save did not write", id="pickle"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.9999])
def test_truncated_checkpoints_are_refused(tmp_path: Path, share: float) -> None:
    whole = saved(tmp_path, good()).read_bytes()
    path = tmp_path / "truncated.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="found a folder"):
        load_checkpoint(tmp_path)


def test_a_torchscript_archive_is_refused_without_a_warning(repository: Path) -> None:
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_checkpoint(repository / "uniform_4x8x3" / "1" / "model.ts")


class Payload:
    """Would write a file when unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._trace,))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_never_runs(tmp_path: Path, legacy: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "model.pt"
    content = OrderedDict(good()) | {"layers.0.extra": Payload(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="so it is not opened"):
        load_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload must be a real one"


def test_very_many_lone_layers_are_refused_by_a_message_of_their_own(tmp_path: Path) -> None:
    names = ("base_weight", "spline_weight", "grid", "spline_scaler")
    state = {f"l{i}.{name}": torch.ones(1) for i in range(1200) for name in names}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError,
        match=r"holds 1,200 KANs among 4,800 tensors and modules, expected at most 1,041 KANs",
    ):
        load_checkpoint(tmp_path / "model.pt")
