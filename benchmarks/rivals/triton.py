"""Triton Inference Server with its Python backend, from the wheel of nvidia-pytriton.

The wheel carries NVIDIA's tritonserver, a program in C++. This script writes a model repository and
becomes that program; PyTriton's own layer, which puts another process and queue in between, is not
used. Triton's onnxruntime backend comes only in NVIDIA's images of several gigabytes, so
onnxruntime runs in the Python backend's process, which Triton reaches by shared memory.

Configured for latency and throughput on two cores: one instance; dynamic batching without a delay,
so requests that wait anyway run together and none waits for another; HTTP, metrics and logs off;
onnxruntime on one thread, which does not spin.

Wire: ModelInfer of the Open Inference Protocol over gRPC, raw_input_contents, model `digits`.

This file is two programs: the script, and the model, as which it is copied into the repository.
"""

import argparse
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

CONFIG = """
name: "digits"
backend: "python"
max_batch_size: 4096
input [ {{ name: "input" data_type: TYPE_FP32 dims: [ {inputs} ] }} ]
output [ {{ name: "output" data_type: TYPE_FP32 dims: [ {outputs} ] }} ]
dynamic_batching {{ max_queue_delay_microseconds: 0 }}
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
parameters: {{ key: "path" value: {{ string_value: "{path}" }} }}
"""
OFF = "http", "metrics", "gpu-metrics", "cpu-metrics"


def open_session(path: str) -> ort.InferenceSession:
    """Load a model, to be run on the thread that calls it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class TritonPythonModel:
    """What the Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model that the configuration names."""
        parameters = json.loads(args["model_config"])["parameters"]
        self._session = open_session(parameters["path"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run all requests that waited as one batch, and give each its rows."""
        import triton_python_backend_utils as triton  # only there when Triton runs this

        inputs = [triton.get_input_tensor_by_name(r, "input").as_numpy() for r in requests]
        batch = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        output = self._session.run(["output"], {"input": batch})[0]
        ends = np.cumsum([len(x) for x in inputs[:-1]], dtype=int)
        return [
            triton.InferenceResponse([triton.Tensor("output", y)]) for y in np.split(output, ends)
        ]


def write_repository(folder: Path, model: Path) -> Path:
    """Write a model repository below a folder. The ONNX file stays where it is."""
    session = open_session(str(model))
    inputs, outputs = session.get_inputs()[0].shape[1], session.get_outputs()[0].shape[1]
    home = folder / "models" / "digits"
    (home / "1").mkdir(parents=True, exist_ok=True)
    config = CONFIG.format(inputs=inputs, outputs=outputs, path=model.resolve())
    (home / "config.pbtxt").write_text(config)
    shutil.copy(__file__, home / "1" / "model.py")
    return home.parent


def write_backends(folder: Path, triton: Path) -> Path:
    """Write a folder of backends: the wheel's only one, with the stub for this Python beside it.

    Args:
        folder: Where.
        triton: The wheel's copy of Triton, which keeps a stub for every Python elsewhere.

    Returns:
        The folder of backends.
    """
    backends = folder / "backends"
    shutil.copytree(triton / "backends", backends, dirs_exist_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    return backends


def main() -> None:
    """Become tritonserver, which serves until SIGTERM."""
    parser = argparse.ArgumentParser(description="Serve a model with Triton.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="for its files; by default a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="rival-"))

    site = Path(sysconfig.get_path("platlib"))
    triton = site / "pytriton" / "tritonserver"
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={write_repository(folder, arguments.model)}",
        f"--backend-directory={write_backends(folder, triton)}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={arguments.port}",
        *(f"--allow-{what}=false" for what in OFF),
        "--log-info=false",
        "--log-warning=false",
    ]
    # The stub embeds Python, and takes the packages of the first one on the PATH.
    libraries = sysconfig.get_config_var("LIBDIR"), str(site / "nvidia_pytriton.libs")
    environment = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    }
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main()
