"""LitServe: FastAPI in one process, the model in another, queues between them.

Configured for latency and throughput on two cores: one worker and one API server; no batching; the
queue of answers on ZeroMQ, which LitServe recommends above 100 requests a second; logs off;
onnxruntime on one thread, which does not spin.

Wire: HTTP. POST /predict with rows as raw float32, row-major, little-endian, of type
application/octet-stream; outputs come back the same way. LitServe is made for JSON: the annotations
make FastAPI hand over the bytes as they are, and it sends an answer that is a Response as it is.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

# Before this folder is searched: it has a module that is named like the package.
sys.path.pop(0)

import litserve as ls
import numpy as np
from fastapi import Body, Response
from numpy.typing import NDArray

BYTES = "application/octet-stream"


class Digits(ls.LitAPI):
    """An ONNX file; all but the path is set up in the worker."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def setup(self, device: str) -> None:
        """Load the file."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        self._session = ort.InferenceSession(self._path, options, providers=providers)
        self._inputs = self._session.get_inputs()[0].shape[1]

    def decode_request(
        self, request: Annotated[bytes, Body(media_type=BYTES)], **kwargs: Any
    ) -> NDArray[np.float32]:
        """Make rows of bytes."""
        return np.frombuffer(request, "<f4").reshape(-1, self._inputs)

    def predict(self, x: NDArray[np.float32], **kwargs: Any) -> NDArray[np.float32]:
        """Run the model."""
        output: NDArray[np.float32] = self._session.run(["output"], {"input": x})[0]
        return output

    def encode_response(self, output: NDArray[np.float32], **kwargs: Any) -> Response:
        """Make an answer of outputs."""
        return Response(output.tobytes(), media_type=BYTES)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="Serve a model with LitServe.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="taken like the others' and not used")
    arguments = parser.parse_args()

    # LitServe ends its processes on an interrupt; SIGTERM, which ends those, would leave them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    api = Digits(str(arguments.model.resolve()))
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=arguments.port,
        num_api_servers=1,
        log_level="error",
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
