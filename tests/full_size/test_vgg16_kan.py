"""VGG16-KAN at full size: exported within bounds, served, and answering over gRPC as eager does."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
import torch

from examples.vgg16_kan.network import draw_weights, vgg16_kan
from kan_bundle.integrity import record_file
from kan_bundle.manifest import Manifest, read_manifest
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.conftest import ROOT
from tests.processes import serving
from tests.wire import raw_output, raw_request

pytestmark = pytest.mark.full_size

IMAGES = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("vgg16_kan") / "vgg16_kan.pt"
    torch.save(draw_weights(vgg16_kan()).state_dict(), path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def weights_bytes() -> int:
    return sum(4 * tensor.numel() for tensor in vgg16_kan().state_dict().values())


@pytest.fixture(scope="module")
def repository(checkpoint: Path, weights_bytes: int) -> Path:
    """The export, in a process of its own, whose peak memory is looked at."""
    repository = checkpoint.parent / "models"
    command = [sys.executable, "-m", "export", str(checkpoint), "--output", str(repository)]
    command += ["--model", "examples.vgg16_kan.network:vgg16_kan", "--input-shape", "3,224,224"]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = 1024 * usage.ru_maxrss
    print(
        f"exported in {time.perf_counter() - started:.0f} s, peak memory {peak / 1e9:.2f} GB, "
        f"{peak / weights_bytes:.2f} times the weights of {weights_bytes / 1e9:.2f} GB"
    )
    assert process.returncode == 0
    assert peak < 4 * weights_bytes
    return repository


@pytest.fixture(scope="module")
def manifest(repository: Path) -> Manifest:
    return read_manifest(repository / "vgg16_kan" / "1")


def test_the_weights_are_the_one_file_beside_the_graph(
    repository: Path, manifest: Manifest
) -> None:
    folder = repository / "vgg16_kan" / "1"
    assert {file.name for file in folder.iterdir()} == {*manifest.files, "manifest.json"}
    for name, record in manifest.files.items():
        assert record_file(folder / name) == record
    assert manifest.files["model.onnx"].size_bytes < 2**20
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    places = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"model.onnx.data"}


def test_every_kan_layer_was_found(manifest: Manifest) -> None:
    widths = [(layer.in_features, layer.out_features) for layer in manifest.layers]
    assert widths == [(25088, 2048), (2048, 2048), (2048, 2)]
    assert all(record.excess <= 1 for record in manifest.parity)


def test_images_come_back_right_over_grpc(checkpoint: Path, repository: Path) -> None:
    network = vgg16_kan().eval()
    network.load_state_dict(torch.load(checkpoint, mmap=True), assign=True)
    images = np.random.default_rng(1).standard_normal((IMAGES, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        eager = network(torch.from_numpy(images)).numpy()
    del network
    with (
        serving("--model-repository", repository, "--engine-threads", "2") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = GRPCInferenceServiceStub(channel)
        started = time.perf_counter()
        served = raw_output(stub.ModelInfer(raw_request(images, "vgg16_kan")))
        print(f"{IMAGES} images answered in {time.perf_counter() - started:.2f} s")
        # More than the default limit of gRPC, which is 4 MiB.
        assert images.nbytes > 4 * 2**20
    # Two float32 sums of 2e5 terms each.
    np.testing.assert_allclose(served, eager, rtol=2e-4, atol=1e-4)
