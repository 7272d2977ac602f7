"""BentoML: its production server, a supervisor and one worker, with a mounted application.

Configured for latency and throughput on two cores: the model in the worker's event loop, since a
thread takes longer to reach than the model to run; uvloop and httptools; no batching; metrics and
access logs off; onnxruntime on one thread, which does not spin. A mounted application passes
through BentoML's server and all its middleware, but not through its methods, which take JSON.

Wire: HTTP. POST /predict with rows as raw float32, row-major, little-endian, of type
application/octet-stream; outputs come back the same way.

This file is two programs: the script, which becomes BentoML's command, and the service, which the
worker imports.
"""
# ruff: noqa: E402

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATH = "RIVAL_MODEL"  # names the file to the worker

if __name__ == "__main__":
    # Before this folder is searched: it has a module that is named like the package.
    sys.path.pop(0)

import bentoml
import numpy as np
import onnxruntime as ort
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def predict(request: Request) -> Response:
    """Answer one request."""
    output = bentoml.get_current_service().run(await request.body())
    return Response(output, media_type="application/octet-stream")


@bentoml.service(workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}})
@bentoml.asgi_app(Starlette(routes=[Route("/predict", predict, methods=["POST"])]))
class Digits:
    """An ONNX file."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        self._session = ort.InferenceSession(os.environ[PATH], options, providers=providers)
        self._inputs = self._session.get_inputs()[0].shape[1]

    def run(self, raw: bytes) -> bytes:
        """From rows to outputs."""
        rows = np.frombuffer(raw, "<f4").reshape(-1, self._inputs)
        output: bytes = self._session.run(["output"], {"input": rows})[0].tobytes()
        return output


def main() -> None:
    """Become BentoML's command, which serves until SIGTERM."""
    parser = argparse.ArgumentParser(description="Serve a model with BentoML.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="for its files; by default a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or tempfile.mkdtemp(prefix="rival-")
    environment = os.environ | {
        PATH: str(arguments.model.resolve()),
        "BENTOML_HOME": str(folder),
        "BENTOML_DO_NOT_TRACK": "True",
        "PYTHONSAFEPATH": "1",
    }
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.rivals.bentoml:Digits"]
    where = ["--working-dir", str(ROOT), "--host", "127.0.0.1", "--port", str(arguments.port)]
    os.execve(command[0], [*command, *where, "--quiet"], environment)


if __name__ == "__main__":
    main()
