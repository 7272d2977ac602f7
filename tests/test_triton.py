"""The repository that an export writes, in NVIDIA's Triton Inference Server.

The program is that of nvidia-pytriton's wheel, which has no backend for onnxruntime: that comes in
images of several gigabytes alone. So triton_backend.py stands in for it. Everything else is
Triton's: it reads config.pbtxt, takes the model's folder as it is, and answers gRPC.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import text_format

from kan_bundle.golden import excess, read_golden, side_by_side
from kan_bundle.manifest import read_manifest
from protos import inference_pb2 as pb
from protos import model_config_pb2
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.conftest import ROOT, STATE_DICTS, Golden
from tests.ports import free_port
from tests.servers import WAIT_S
from tests.wire import raw_output, raw_request

VENV = ROOT / ".venv-rival-triton"
OFF = ("http", "metrics", "gpu-metrics", "cpu-metrics")

pytestmark = pytest.mark.skipif(
    not (VENV / "installed").exists(),
    reason="Triton is not installed; `make .venv-rival-triton/installed` does it, with 1 GB",
)


@contextmanager
def tritonserver(repository: Path, backends: Path, port: int) -> Iterator["subprocess.Popen[str]"]:
    """Triton's program with the wheel's only backend, and whatever else lies in a folder."""
    (packages,) = VENV.glob("lib/python*/site-packages")
    triton, version = packages / "pytriton" / "tritonserver", packages.parent.name[len("python") :]
    shutil.copytree(triton / "backends", backends, dirs_exist_ok=True)
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    asked = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    python = VENV / "bin" / "python"
    found = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    libraries = (found.stdout.strip(), str(packages / "nvidia_pytriton.libs"))
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        *(f"--allow-{what}=false" for what in OFF),
    ]
    with subprocess.Popen(
        command,
        # The stub embeds Python, and takes the packages of the first one on the PATH.
        env=os.environ
        | {
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "PATH": os.pathsep.join((str(VENV / "bin"), os.environ["PATH"])),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        try:
            yield popen
        finally:
            popen.terminate()  # so that it ends its backend
            with suppress(subprocess.TimeoutExpired):
                popen.communicate(timeout=WAIT_S)
            popen.kill()


@pytest.fixture(scope="module")
def stub(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GRPCInferenceServiceStub]:
    """A client of a Triton that serves the repository."""
    backends = tmp_path_factory.mktemp("backends")
    (backends / "onnxruntime").mkdir()
    shutil.copy(ROOT / "tests" / "triton_backend.py", backends / "onnxruntime" / "model.py")
    port = free_port()
    with (
        tritonserver(repository, backends, port),
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = GRPCInferenceServiceStub(channel)
        ready = stub.ServerReady(pb.ServerReadyRequest(), wait_for_ready=True, timeout=WAIT_S)
        assert ready.ready  # which Triton is once every model is
        yield stub


def test_triton_answers_what_the_goldens_say(
    repository: Path, stub: GRPCInferenceServiceStub, golden: Golden
) -> None:
    bundle = repository / golden.name / "1"
    manifest = read_manifest(bundle)
    known = read_golden((bundle / "golden.npz").read_bytes(), manifest.inputs)
    (x,) = known.inputs
    response = stub.ModelInfer(raw_request(x.astype(np.float32), golden.name), timeout=WAIT_S)
    assert response.model_version == "1"
    found = side_by_side([raw_output(response)])
    assert excess(found, known.outputs, known.tolerance).max() <= 1


def test_triton_reads_config_pbtxt_as_it_was_meant(
    repository: Path, stub: GRPCInferenceServiceStub, golden: Golden
) -> None:
    text = (repository / golden.name / "config.pbtxt").read_text()
    ours = text_format.Parse(text, model_config_pb2.ModelConfig())
    theirs = stub.ModelConfig(pb.ModelConfigRequest(name=golden.name), timeout=WAIT_S).config
    assert theirs.backend == "onnxruntime"  # from our platform
    for field, value in ours.ListFields():
        if field.name != "dynamic_batching":  # which it completes
            assert getattr(theirs, field.name) == value, field.name
    assert theirs.HasField("dynamic_batching")
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=golden.name), timeout=WAIT_S)
    manifest = read_manifest(repository / golden.name / "1")
    for kind in ("inputs", "outputs"):
        found = [(t.name, t.datatype, tuple(t.shape)) for t in getattr(metadata, kind)]
        assert found == [(t.name, t.datatype, t.shape) for t in getattr(manifest, kind)]


def test_the_wheels_triton_has_everything_but_the_backend(repository: Path, tmp_path: Path) -> None:
    """Its images have it. What is not read or understood would be told before that."""
    with tritonserver(repository, tmp_path / "backends", free_port()) as popen:
        _, log = popen.communicate(timeout=WAIT_S)
    for golden in STATE_DICTS:
        assert golden.name in log
    assert log.count("unable to find backend library for backend 'onnxruntime'") >= len(STATE_DICTS)
    assert popen.returncode == 1
