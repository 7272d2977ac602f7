"""KServe's own client against our server, in its own environment."""

import json
import subprocess

import numpy as np

from serving.server import Server
from tests.conftest import GOLDENS, ROOT, STATE_DICTS

PYTHON = ROOT / ".venv-kserve" / "bin" / "python"
UNIFORM = STATE_DICTS[0]


def test_kserves_client_works_unchanged(server: Server) -> None:
    assert PYTHON.exists(), "run `make test`, which makes the environment"
    script = ROOT / "tests" / "kserve_session.py"
    done = subprocess.run(
        [PYTHON, script, server.address, UNIFORM.name, GOLDENS / f"{UNIFORM.name}.npz"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for key in ("live", "ready", "model_ready"):
        assert said[key] is True, key
    assert (said["id"], said["version"]) == ("7", "1")
    assert {"batch_rows", "model_sha256"} <= set(said["details"])
    for y in said["y"]:  # raw, typed, and with everything that may be asked
        off = np.abs(np.array(y) - UNIFORM.y64)
        assert (off <= 1e-5 * np.maximum(1, np.abs(UNIFORM.y64))).all()
    for what, code, details in (
        ("readiness of no model", "NOT_FOUND", "there is no model 'nope'"),
        ("unknown model", "NOT_FOUND", "there is no model 'nope'"),
        ("wrong width", "INVALID_ARGUMENT", "expected shape [-1, 4]"),
        ("parameter", "UNIMPLEMENTED", "request parameter 'temperature' is not offered"),
    ):
        assert said[what][0] == code
        assert details in said[what][1]
