"""TorchServe, which is no longer maintained: a front end in Java, and one worker in Python.

This script writes a model store and becomes the Java program, as TorchServe's own command starts
it: that command leaves it running when it gets SIGTERM.

Configured for latency and throughput on two cores: one worker; batches of one request, as larger
ones wait; no token; logs and metrics off, which the worker would print for every request and the
front end read; onnxruntime on one thread, which does not spin.

Wire: HTTP. POST /predictions/digits with rows as raw float32, row-major, little-endian, of type
application/octet-stream; outputs come back the same way. Its Open Inference Protocol reads typed
contents only, which it hands to the worker as JSON, and has no raw_input_contents.

This file is two programs: the script, and the handler, as which it is copied into the store.
"""

import argparse
import json
import logging
import os
import shutil
import socket
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

CONFIG = """
inference_address=http://127.0.0.1:{inference}
management_address=http://127.0.0.1:{management}
metrics_address=http://127.0.0.1:{metrics}
grpc_inference_address=127.0.0.1
grpc_management_address=127.0.0.1
grpc_inference_port={grpc_inference}
grpc_management_port={grpc_management}
load_models=digits=digits
default_workers_per_model=1
job_queue_size=1000
disable_token_authorization=true
disable_system_metrics=true
enable_metrics_api=false
"""
OTHERS = "management", "metrics", "grpc_inference", "grpc_management"
MANIFEST = {
    "runtime": "python",
    "model": {
        "modelName": "digits",
        "modelVersion": "1",
        "serializedFile": "model.onnx",
        "handler": "handler.py",
    },
}
QUIET = '<Configuration><Loggers><Root level="off"/></Loggers></Configuration>'
BYTES = "application/octet-stream"


class Digits:
    """An ONNX file; what a worker looks for."""

    def initialize(self, context: Any) -> None:
        """Load the file."""
        logging.disable(logging.WARNING)  # no lines and no metrics for a request
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = Path(context.system_properties["model_dir"]) / "model.onnx"
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = self._session.get_inputs()[0].shape[1]

    def handle(self, requests: list[dict[str, bytearray]], context: Any) -> list[bytes]:
        """Run one request, which is a batch of one."""
        (request,) = requests
        rows = np.frombuffer(request["body"], "<f4").reshape(-1, self._inputs)
        context.set_response_content_type(0, BYTES)
        return [self._session.run(["output"], {"input": rows})[0].tobytes()]


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_store(folder: Path, model: Path) -> Path:
    """Write a model store below a folder, with a model that is a folder and not an archive."""
    home = folder / "store" / "digits"
    (home / "MAR-INF").mkdir(parents=True, exist_ok=True)
    (home / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(MANIFEST))
    shutil.copy(__file__, home / "handler.py")
    shutil.copy(model, home / "model.onnx")
    return home.parent


def main() -> None:
    """Become TorchServe's front end, which serves until SIGTERM."""
    parser = argparse.ArgumentParser(description="Serve a model with TorchServe.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="for its files; by default a temporary one")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="rival-"))).resolve()

    store = write_store(folder, arguments.model)
    config, quiet = folder / "config.properties", folder / "log4j2.xml"
    ports = {name: free_port() for name in OTHERS}
    config.write_text(CONFIG.format(inference=arguments.port, **ports))
    quiet.write_text(QUIET)

    site = Path(sysconfig.get_path("purelib"))
    java = shutil.which("java", path=f"{os.environ.get('JAVA_HOME', '')}/bin:{os.environ['PATH']}")
    if java is None:
        sys.exit("TorchServe needs Java 17; install it, or set JAVA_HOME")
    command = [
        java,
        f"-Dmodel_server_home={site}",
        f"-Dlog4j.configurationFile={quiet.as_uri()}",
        f"-Djava.io.tmpdir={folder}",
        *("-cp", f"{site}/ts/frontend/*", "org.pytorch.serve.ModelServer"),
        *("--python", sys.executable, "-f", str(config), "-s", str(store), "-ncs"),
    ]
    os.chdir(folder)  # it writes more files where it runs
    os.execv(java, command)


if __name__ == "__main__":
    main()
