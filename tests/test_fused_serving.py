"""--fused: what the server says of how models run, and what it does without the library."""

import json
import socket
import struct
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

import kan_ops
from kan_bundle.manifest import read_manifest
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving import runtime
from serving.engine import Engine, EngineOptions
from serving.errors import StartupError
from serving.runtime import Fused
from serving.server import Server
from tests.conftest import run_module
from tests.processes import serving

MODEL = "uniform_4x8x3"


def scraped(address: str) -> dict[tuple[str, str], float]:
    """Read how many layers of each model run in which way."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    family = families["kanserve_model_kan_layers"]
    return {(s.labels["model"], s.labels["execution"]): s.value for s in family.samples}


@pytest.mark.parametrize(
    ("fused", "layers"), [("auto", 2), ("on", 2), ("off", 0)], ids=["auto", "on", "off"]
)
def test_log_metadata_and_metric_say_how_a_model_runs(
    repository: Path, fused: str, layers: int
) -> None:
    with serving("--model-repository", repository, "--fused", fused) as process:
        (ready,) = [e for e in process.events if e.get("model") == MODEL]
        assert (ready["kan_layers"], ready["fused_layers"]) == (2, layers)
        with grpc.insecure_channel(process.address) as channel:
            stub = GRPCInferenceServiceStub(channel)
            properties = stub.ModelMetadata(pb.ModelMetadataRequest(name=MODEL)).properties
        assert (properties["kan_layers"], properties["fused_layers"]) == ("2", str(layers))
        counts = scraped(process.events[-1]["metrics"])
        assert counts[MODEL, "fused"] == layers
        assert counts[MODEL, "standard"] == 2 - layers


def test_by_default_layers_run_fused(server: Server, stub: GRPCInferenceServiceStub) -> None:
    properties = stub.ModelMetadata(pb.ModelMetadataRequest(name=MODEL)).properties
    assert properties["fused_layers"] == "2"
    assert scraped(server.metrics_address)[MODEL, "fused"] == 2


def test_without_the_library_auto_runs_standard_operators_and_on_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kan_ops, "_LIBRARY", "missing.so")
    with capture_logs() as log:
        assert runtime.choose_fused("auto", "cpu") is False
    assert [(event["event"], event["log_level"]) for event in log] == [("not_fused", "warning")]
    assert "was not built" in log[0]["reason"]
    with pytest.raises(StartupError, match=r"--fused on: .* was not built"):
        runtime.choose_fused("on", "cpu")


def test_the_operator_is_for_cpu() -> None:
    assert runtime.choose_fused("auto", "cuda") is False
    with pytest.raises(StartupError, match="--fused on: the operator is for CPU"):
        runtime.choose_fused("on", "cuda")


@pytest.mark.parametrize("fused", ["auto", "on"])
def test_a_library_that_is_none_is_not_loaded(
    fused: Fused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(kan_ops, "library_path", lambda: tmp_path / "broken.so")
    if fused == "auto":
        assert runtime.choose_fused(fused, "cpu") is False
    else:
        with pytest.raises(StartupError, match="--fused on"):
            runtime.choose_fused(fused, "cpu")


def test_a_wrong_word_is_refused(repository: Path) -> None:
    done = run_module("serving", "--model-repository", repository, "--fused", "perhaps")
    assert done.returncode == 2
    assert "--fused (KANSERVE_FUSED)" in json.loads(done.stderr)["reason"]


def test_a_port_in_use_for_metrics_is_refused(server: Server, repository: Path) -> None:
    port = server.metrics_address.rpartition(":")[2]
    ports = ["--grpc-port", "0", "--metrics-port", port]
    done = run_module("serving", "--model-repository", repository, *ports)
    assert done.returncode == 1
    reason = json.loads(done.stderr.splitlines()[-1])["reason"]
    assert f"cannot listen on 127.0.0.1:{port} for metrics" in reason


def test_a_scraper_that_goes_away_leaves_nothing_in_the_log_but_json(repository: Path) -> None:
    with serving("--model-repository", repository) as process:
        host, _, port = process.events[-1]["metrics"].rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /met")
            # Closing now sends a reset, not an end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert scraped(process.events[-1]["metrics"])[MODEL, "fused"] == 2
        process.popen.terminate()
        process.until("stopped")  # every line is parsed


def test_both_ways_answer_alike_to_rounding(repository: Path) -> None:
    folder = repository / MODEL / "1"
    model, manifest = (folder / "model.onnx").read_bytes(), read_manifest(folder)
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    answers = []
    for fused in (False, True):
        engine = Engine(model, manifest, folder, EngineOptions(threads=2, fused=fused))
        assert engine.fused_layers == 2 * fused
        answers.append(engine.run([x])[0])
    np.testing.assert_allclose(answers[0], answers[1], atol=2e-6)
    assert (answers[0] != answers[1]).any(), "two different programs ran"
