"""What is served and what is not: verification and replay."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from structlog.testing import capture_logs

from export import export_checkpoint
from kan_bundle.errors import BundleError, GraphError, IntegrityError
from kan_bundle.golden import Golden, read_golden, write_golden
from kan_bundle.integrity import record_file
from kan_bundle.layout import BundleFolder, find_bundles
from kan_bundle.manifest import read_manifest, write_manifest
from serving.errors import ModelNotFound, ModelNotReady
from serving.models.host import LocalHost
from serving.models.lifecycle import ModelLifecycle
from serving.models.loading import LoadedModel, load_bundle
from serving.models.policy import VersionPolicy
from serving.models.repository import Repository
from tests.conftest import GOLDENS
from tests.loading import LIMITS, make_engine

MODEL = "uniform_4x8x3"


def load(folder: BundleFolder) -> LoadedModel:
    return load_bundle(folder, partial(make_engine, fused=False), LIMITS)


def everything(root: Path, load: Callable[[BundleFolder], LoadedModel] = load) -> Repository:
    """A repository with every version that is there."""
    repository = Repository()
    host = LocalHost(repository, lambda version: load(version.folder))
    ModelLifecycle(root, VersionPolicy(latest=None), host).refresh()
    return repository


@pytest.fixture
def folder(repository: Path, tmp_path: Path) -> BundleFolder:
    """A copy of one bundle, to be damaged."""
    shutil.copytree(repository / MODEL, tmp_path / MODEL)
    return BundleFolder(MODEL, 1, tmp_path / MODEL / "1")


def reseal(folder: BundleFolder, **changes: object) -> None:
    """Write the manifest anew, with true hashes: damage that hashes cannot show."""
    manifest = read_manifest(folder.path)
    files = {name: record_file(folder.path / name) for name in manifest.files}
    write_manifest(replace(manifest, files=files, **changes), folder.path)  # type: ignore[arg-type]


def test_an_untouched_bundle_is_served(folder: BundleFolder) -> None:
    model = load(folder)
    assert model.engine.run([np.zeros((3, 4), np.float32)])[0].shape == (3, 3)


@pytest.mark.parametrize("name", ["model.onnx", "model.ts", "golden.npz", "manifest.json"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.999])
def test_a_changed_byte_is_not_served(folder: BundleFolder, name: str, place: float) -> None:
    content = bytearray((folder.path / name).read_bytes())
    content[int(place * len(content))] ^= 0x01
    (folder.path / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        load(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.ts", "golden.npz", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="truncated"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"\n"), id="longer"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="a folder"),
    ],
)
def test_a_missing_or_damaged_file_is_not_served(
    folder: BundleFolder, name: str, damage: Callable[[Path], object]
) -> None:
    damage(folder.path / name)
    with pytest.raises(BundleError, match=name):
        load(folder)


def test_other_weights_with_true_hashes_fail_the_golden_replay(folder: BundleFolder) -> None:
    path = folder.path / "model.onnx"
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.name == "layers.0.product.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 1e-2
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    reseal(folder)
    with pytest.raises(IntegrityError, match="golden replay is off by"):
        load(folder)


def test_other_answers_with_true_hashes_fail_the_golden_replay(folder: BundleFolder) -> None:
    path = folder.path / "golden.npz"
    golden = read_golden(path.read_bytes(), read_manifest(folder.path).inputs)
    outputs = golden.outputs.copy()
    outputs[0, 0] += 1e-3
    write_golden(replace(golden, outputs=outputs), path)
    reseal(folder)
    with pytest.raises(IntegrityError, match="golden replay is off by"):
        load(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.ts", "golden.npz", "manifest.json"])
def test_a_pipe_or_a_device_is_not_waited_for(folder: BundleFolder, name: str) -> None:
    (folder.path / name).unlink()
    os.mkfifo(folder.path / name)
    with pytest.raises(BundleError, match="regular file"):
        load(folder)
    (folder.path / name).unlink()
    (folder.path / name).symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="regular file"):
        load(folder)


@pytest.mark.parametrize(
    "golden",
    [
        pytest.param(Golden((np.zeros(()),), np.zeros((1, 3)), np.zeros((1, 3))), id="scalar"),
        pytest.param(
            Golden((np.zeros((0, 4), np.float32),), np.zeros((0, 3)), np.zeros((0, 3))),
            id="no rows",
        ),
        pytest.param(
            Golden((np.zeros((1, 4), np.float32),), np.full((1, 3), 9.0), np.full((1, 3), -1.0)),
            id="negative tolerance",
        ),
        pytest.param(
            Golden((np.zeros((1, 4), np.float32),), np.full((1, 3), 9.0), np.full((1, 3), np.inf)),
            id="infinite tolerance",
        ),
        pytest.param(
            Golden((np.zeros((1, 4), np.float32),), np.array([["x"] * 3]), np.zeros((1, 3))),
            id="text",
        ),
    ],
)
def test_a_golden_that_proves_nothing_is_not_served(folder: BundleFolder, golden: Golden) -> None:
    write_golden(golden, folder.path / "golden.npz")
    reseal(folder)
    with pytest.raises(IntegrityError, match=r"golden\.npz: expected"):
        load(folder)


def test_what_no_check_has_foreseen_refuses_one_bundle_only(repository: Path) -> None:
    def fail_for_one(folder: BundleFolder) -> LoadedModel:
        if folder.name == MODEL:
            raise ZeroDivisionError("unforeseen")
        return load(folder)

    with capture_logs() as log:
        everything(repository, fail_for_one)
    (refused,) = (event for event in log if event["event"] == "model_refused")
    assert "ZeroDivisionError: unforeseen" in refused["reason"]


def test_a_file_that_is_no_model_is_not_served(folder: BundleFolder) -> None:
    (folder.path / "model.onnx").write_bytes(b"not a model")
    reseal(folder)
    with pytest.raises(GraphError, match="expected an ONNX model, found wire type 6"):
        load(folder)


def test_tensors_that_are_not_the_manifests_are_not_served(folder: BundleFolder) -> None:
    spec = read_manifest(folder.path).inputs[0]
    reseal(folder, inputs=(replace(spec, shape=(-1, 5)),))
    with pytest.raises(IntegrityError, match="the manifest says"):
        load(folder)


def test_a_renamed_bundle_is_not_served(folder: BundleFolder) -> None:
    with pytest.raises(IntegrityError, match="cannot be renamed"):
        load(replace(folder, name="other"))
    with pytest.raises(IntegrityError, match=r"version 1, the folder .* version 2; .*be renamed"):
        load(replace(folder, version=2))


def test_one_bad_bundle_does_not_stop_the_others(repository: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(repository, root)
    (root / MODEL / "1" / "model.onnx").write_bytes(b"damaged")
    loaded = everything(root)
    states = [v.state for versions in loaded.models.values() for v in versions.values()]
    assert states.count("UNAVAILABLE") == 1
    assert len(states) == len(find_bundles(root))
    assert loaded.find("adapted_5x7x3", "").manifest.name == "adapted_5x7x3"
    assert loaded.served_versions(MODEL) == []
    with pytest.raises(ModelNotReady, match="failed its checks"):
        loaded.find(MODEL, "")


def test_the_newest_version_that_is_ready_answers(tmp_path: Path) -> None:
    for _ in range(3):
        export_checkpoint(GOLDENS / f"{MODEL}.pt", output=tmp_path, activation="silu")
    (tmp_path / MODEL / "3" / "golden.npz").unlink()
    loaded = everything(tmp_path)
    assert loaded.served_versions(MODEL) == [1, 2]
    assert loaded.find(MODEL, "").manifest.version == 2
    assert loaded.find(MODEL, "1").manifest.version == 1
    with pytest.raises(ModelNotReady):
        loaded.find(MODEL, "3")
    with pytest.raises(ModelNotFound, match=r"it serves 1, 2$"):
        loaded.find(MODEL, "4")


def test_nothing_ready_is_not_ready(folder: BundleFolder) -> None:
    (folder.path / "manifest.json").unlink()
    assert not everything(folder.path.parent.parent).served


def test_a_version_folder_without_a_bundle_is_known_and_refused(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    with capture_logs() as log:
        assert everything(tmp_path).models["m"][1].state == "UNAVAILABLE"
    assert "manifest.json" in log[0]["reason"]
