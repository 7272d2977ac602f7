"""NVIDIA's own client against our server; its versions clash with ours, so it runs in its own
environment."""

import json
import subprocess
from typing import Any

import numpy as np
import pytest

from serving.server import Server
from tests.conftest import GOLDENS, ROOT, Golden

PYTHON = ROOT / ".venv-tritonclient" / "bin" / "python"


@pytest.fixture
def answers(server: Server, golden: Golden) -> dict[str, Any]:
    assert PYTHON.exists(), "run `make test`, which makes the environment"
    script = ROOT / "tests" / "tritonclient_session.py"
    done = subprocess.run(
        [PYTHON, script, server.address, golden.name, GOLDENS / f"{golden.name}.npz"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_tritonclient_works_unchanged(answers: dict[str, Any], golden: Golden) -> None:
    for key in ("live", "ready", "model_ready", "version_ready"):
        assert answers[key] is True, key
    assert answers["server"]["name"] == "kanserve"
    assert answers["model"]["versions"] == ["1"]
    assert answers["model"]["inputs"] == [
        {"name": "input", "datatype": "FP32", "shape": ["-1", str(golden.widths[0])]}
    ]
    assert answers["config_name"] == golden.name
    assert answers["max_batch_size"] >= 1
    for key in ("y", "y_named_output", "y_gzip", "y_aio"):
        off = np.abs(np.array(answers[key]) - golden.y64)
        assert (off <= 1e-5 * np.maximum(1, np.abs(golden.y64))).all(), key
    assert {
        key: answers[key]
        for key in ("unknown_model", "unknown_version", "wrong_width", "wrong_type", "statistics")
    } == {
        "unknown_model": "StatusCode.NOT_FOUND",
        "unknown_version": "StatusCode.NOT_FOUND",
        "wrong_width": "StatusCode.INVALID_ARGUMENT",
        "wrong_type": "StatusCode.INVALID_ARGUMENT",
        "statistics": "StatusCode.UNIMPLEMENTED",
    }
