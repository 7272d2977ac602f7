"""On a CUDA device: `make test-cuda`. What can be shown without one is in test_engine.py."""

import io
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console

from export import export_checkpoint
from export.report import Report
from kan_bundle.errors import IntegrityError
from kan_bundle.golden import excess, read_golden, side_by_side
from kan_bundle.layout import BundleFolder
from kan_bundle.manifest import read_manifest
from kan_model import KAN
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving import runtime
from serving.batching import Limits
from serving.engine import Engine, EngineOptions
from serving.models.loading import load_bundle
from tests.bundles import CLOSE, publish
from tests.conftest import STATE_DICTS, Golden, run_module
from tests.processes import serving
from tests.servers import await_true, served
from tests.wire import raw_output, raw_request

UNIFORM = STATE_DICTS[0]
MIB = 2**20

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime here is for CPU alone: `make test-cuda` installs the other")
    runtime.prepare("cuda")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sums are long: fewer bits in its products show."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    torch.save(KAN([256, 256, 10]).state_dict(), root / "wide.pt")
    export_checkpoint(
        root / "wide.pt",
        output=root,
        activation="silu",
        report=Report(Console(file=io.StringIO())),
    )
    return root / "wide" / "1"


def made(folder: Path, **options: Any) -> Engine:
    model = (folder / "model.onnx").read_bytes()
    chosen = EngineOptions(**{"provider": "cuda", **options})
    return Engine(model, read_manifest(folder), folder, chosen)


def worst(engine: Engine, folder: Path) -> float:
    """The largest deviation from the golden answers, as a multiple of what is allowed."""
    content = (folder / "golden.npz").read_bytes()
    golden = read_golden(content, read_manifest(folder).inputs)
    found = side_by_side(engine.run(golden.inputs))
    return float(excess(found, golden.outputs, golden.tolerance).max())


def device_bytes() -> int:
    """Memory of the device that is taken, by everything that runs on it."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[0]) * MIB


@pytest.mark.parametrize("graph_rows", [0, 1024], ids=["plain", "graphs"])
def test_answers_are_upstreams(repository: Path, golden: Golden, graph_rows: int) -> None:
    folder = repository / golden.name / "1"
    engine = made(folder, graph_rows=graph_rows)
    for _ in range(3):  # a replay is not a capture
        (found,) = engine.run([golden.x])
        np.testing.assert_allclose(found, golden.y64, rtol=1e-5, atol=1e-5)
        assert worst(engine, folder) <= 1.0


def test_every_node_is_on_the_device(repository: Path) -> None:
    for golden in STATE_DICTS:
        placement = made(repository / golden.name / "1").placement
        assert set(placement) == {"CUDAExecutionProvider"}


def test_graphs_of_all_sizes_and_plain_runs_between_them_give_the_same_answers(
    wide: Path,
) -> None:
    plain, captured = made(wide), made(wide, graph_rows=48)
    rng = np.random.default_rng(0)
    for rows in [*rng.permutation(64), 48, 1, 200, 48, 1]:
        x = rng.normal(size=(rows, 256)).astype(np.float32)
        np.testing.assert_allclose(captured.run([x])[0], plain.run([x])[0], **CLOSE)


@pytest.mark.parametrize("graph_rows", [0, 32], ids=["plain", "graphs"])
def test_runs_in_several_threads_give_the_same_answers(wide: Path, graph_rows: int) -> None:
    engine = made(wide, graph_rows=graph_rows)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(rows, 256)).astype(np.float32) for rows in range(1, 41)]
    expected = [engine.run([x])[0] for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(lambda i: engine.run([inputs[i % 40]])[0], range(400))):
            np.testing.assert_allclose(found, expected[i % 40], **CLOSE)


def test_fewer_bits_are_had_only_when_asked_for_and_then_found(wide: Path) -> None:
    """Since compute capability 8.0 products can keep 10 bits, which is onnxruntime's default."""

    def loaded(tf32: bool) -> None:
        folder = BundleFolder("wide", 1, wide)
        load_bundle(
            folder,
            lambda model, manifest, place: Engine(
                model, manifest, place, EngineOptions("cuda", tf32=tf32)
            ),
            Limits(1024, 0.0, 1024, 2**30),
        )

    loaded(False)
    with pytest.raises(IntegrityError, match=r"golden replay is off by .* on this machine"):
        loaded(True)


def test_memory_of_a_large_batch_is_given_back(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(wide)
    small, large = np.zeros((1, 256), np.float32), np.zeros((200_000, 256), np.float32)
    engine.run([small])
    engine.run([large])
    kept = device_bytes()
    later = time.monotonic() + 60
    monkeypatch.setattr("serving.engine.time.monotonic", lambda: later)
    engine.run([small])
    assert kept - device_bytes() > large.nbytes
    np.testing.assert_allclose(engine.run([large])[0][:1], engine.run([small])[0], **CLOSE)


def test_versions_that_are_unloaded_give_their_memory_back(wide: Path) -> None:
    taken = []
    for _ in range(20):
        made(wide, graph_rows=1024).run([np.zeros((3, 256), np.float32)])
        taken.append(device_bytes())
    assert max(taken[2:]) - taken[2] < 16 * MIB


def ask_everything(stub: GRPCInferenceServiceStub) -> None:
    """Ask for all models, in all sizes, from several threads; every answer is upstream's."""

    def ask(i: int) -> None:
        golden = STATE_DICTS[i % len(STATE_DICTS)]
        rows = slice(i % 7, i % 7 + 1 + i % 50)
        answer = stub.ModelInfer(raw_request(golden.x[rows], golden.name))
        np.testing.assert_allclose(raw_output(answer), golden.y64[rows], rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(400)))


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]], ids=["alone", "two workers"])
def test_a_server_answers_and_ends_well(repository: Path, workers: list[str]) -> None:
    flags = ["--provider", "cuda", "--cuda-graphs", "on", *workers]
    with serving("--model-repository", repository, *flags) as process:
        with grpc.insecure_channel(process.address) as channel:
            ask_everything(GRPCInferenceServiceStub(channel))
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(60) == 0


def test_versions_are_swapped_under_load(repository: Path, tmp_path: Path) -> None:
    for golden in STATE_DICTS:
        publish(repository / golden.name / "1", tmp_path / golden.name, 1)
    chosen = {"provider": "cuda", "cuda_graphs": "on", "model_control": "poll", "poll_s": 0.05}
    with served(tmp_path, **chosen) as (_, stub), ThreadPoolExecutor(1) as pool:
        for version in range(2, 8):
            asked = pool.submit(ask_everything, stub)
            for golden in STATE_DICTS:
                publish(repository / golden.name / "1", tmp_path / golden.name, version)
            asked.result()
        request = raw_request(UNIFORM.x, UNIFORM.name)
        await_true(lambda: stub.ModelInfer(request).model_version == "7")


def test_a_server_without_a_device_refuses_to_start(repository: Path) -> None:
    """onnxruntime alone would serve on the CPU, and say so in a line of its log."""
    done = run_module(
        "serving",
        *("--model-repository", repository, "--provider", "cuda"),
        *("--grpc-port", "0", "--metrics-port", "0"),
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    assert "no usable device" in done.stderr
