"""Clients that are not Python's: Node, which has the .proto alone, and `buf curl`, which asks for
reflection, as grpcurl does."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.server import Server
from serving.service import SERVICE
from tests.conftest import ROOT, STATE_DICTS

NODE = shutil.which("node")
PACKAGES = ROOT / "tests" / "node" / "node_modules"
UNIFORM = STATE_DICTS[0]

pytestmark = pytest.mark.skipif(
    NODE is None or not (PACKAGES / "installed").exists(),
    reason="`make test` finds no node and npm to install tests/node with",
)


def assert_right(found: Any) -> None:
    off = np.abs(np.array(found) - UNIFORM.y64)
    assert (off <= 1e-5 * np.maximum(1, np.abs(UNIFORM.y64))).all()


def test_nodes_client_works_with_the_proto_alone(server: Server) -> None:
    assert NODE is not None
    done = subprocess.run(
        [
            NODE,
            ROOT / "tests" / "node" / "session.mjs",
            server.address,
            ROOT,
            UNIFORM.name,
            json.dumps(UNIFORM.x.tolist()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["health"], said["live"], said["model_ready"]) == ("SERVING", True, True)
    (tensor,) = said["metadata"]["inputs"]
    assert tensor["shape"] == ["-1", str(UNIFORM.widths[0])]
    assert_right(said["raw"])
    assert_right(said["typed"])
    *answers, error = said["stream"]
    assert [id for id, _ in answers] == [str(i) for i in range(len(UNIFORM.x))]
    assert_right([y[0] for _, y in answers])
    assert "expected shape [-1, 4]" in error
    assert said["deadline"][0] == "DEADLINE_EXCEEDED"
    assert said["wrong_width"][0] == "INVALID_ARGUMENT"
    assert said["statistics"] == ["NOT_FOUND", "there is no model 'nope'"]


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"HOME": str(tmp_path), "BUF_CACHE_DIR": str(tmp_path)}


def curl(home: dict[str, str], server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            PACKAGES / ".bin" / "buf",
            "curl",
            "--protocol",
            "grpc",
            "--http2-prior-knowledge",
            *arguments[:-1],
            f"http://{server.address}{arguments[-1]}",
        ],
        env=home,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_reflection_is_enough_to_call_the_server(server: Server, home: dict[str, str]) -> None:
    listed = curl(home, server, "--list-methods", "")
    assert listed.returncode == 0, listed.stderr
    assert f"{SERVICE}/ModelInfer" in listed.stdout
    x = UNIFORM.x
    request = {
        "model_name": UNIFORM.name,
        "inputs": [
            {
                "name": "input",
                "datatype": "FP32",
                "shape": list(x.shape),
                "contents": {"fp32_contents": x.ravel().tolist()},
            }
        ],
    }
    done = curl(home, server, "--data", json.dumps(request), f"/{SERVICE}/ModelInfer")
    assert done.returncode == 0, done.stderr
    (output,) = json.loads(done.stdout)["outputs"]
    assert_right(np.reshape(output["contents"]["fp32Contents"], UNIFORM.y64.shape))
    refused = curl(home, server, "--data", '{"name": "nope"}', f"/{SERVICE}/ModelMetadata")
    assert refused.returncode != 0
    assert json.loads(refused.stderr) == {
        "code": "not_found",
        "message": "there is no model 'nope'",
    }
