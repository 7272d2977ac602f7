"""The image that exports: a checkpoint in a mounted folder becomes a bundle in another."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from kan_bundle.manifest import read_manifest
from tests.bundles import run_onnx
from tests.conftest import STATE_DICTS, Golden
from tests.containers.engine import run

pytestmark = pytest.mark.container

UNIFORM = STATE_DICTS[0]


@pytest.mark.parametrize("owner", [10001, 12345], ids=["its own user", "another user"])
def test_a_checkpoint_becomes_a_bundle_of_whoever_runs_it(
    export_image: str, tmp_path: Path, owner: int
) -> None:
    golden: Golden = UNIFORM
    work = tmp_path / "work"
    (work / "models").mkdir(parents=True)
    shutil.copy(golden.checkpoint, work / "model.pt")
    shutil.chown(work / "models", owner, owner)
    for package in ("export", "kan_ops"):  # as in a checkout, but nothing in it
        (work / package).mkdir()
        (work / package / "__init__.py").touch()
    found = run(
        *("podman", "run", "--rm", "--pull=never", "--user", f"{owner}:{owner}"),
        *("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--network=none"),
        *("--volume", f"{work}:/work:ro", "--volume", f"{work}/models:/work/models"),
        *(export_image, "model.pt", "--activation", golden.activation),
        timeout_s=300,
    )
    assert found == "models/model/1"
    bundle = work / found
    assert {path.stat().st_uid for path in (bundle, *bundle.iterdir())} == {owner}
    assert {record.runtime for record in read_manifest(bundle).parity} >= {
        "onnxruntime cpu",
        "onnxruntime cpu, fused",
        "torchscript",
    }
    (y,) = run_onnx(bundle, golden.x)
    assert (np.abs(y - golden.y64) <= 1e-5 * np.maximum(1, np.abs(golden.y64))).all()


def test_what_cannot_be_exported_is_told_and_leaves_nothing(
    export_image: str, tmp_path: Path
) -> None:
    (tmp_path / "model.pt").write_bytes(b"no checkpoint")
    shutil.chown(tmp_path, 10001, 10001)
    run("podman", "run", "--rm", "--pull=never", "--volume", f"{tmp_path}:/work",
        export_image, "model.pt", code=1)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
