"""MLServer, Seldon's server, with a model class of this file: it has no runtime for ONNX.

Configured for latency and throughput on two cores: inference in the server's own process (each of
its workers is reached through a queue), on uvloop, as its command does; batching off, which always
waits when it is on; metrics and logs off; onnxruntime on one thread, which does not spin.

Wire: ModelInfer of the Open Inference Protocol over gRPC, raw_input_contents, model `digits`. Its
HTTP server cannot be left out, and gets a free port.
"""

import argparse
import asyncio
import sys
from pathlib import Path

# Before this folder is searched: it has a module that is named like the package.
sys.path.pop(0)

import onnxruntime as ort
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import install_uvloop_event_loop

QUIET = {"version": 1, "disable_existing_loggers": False, "root": {"level": "ERROR"}}


class Digits(MLModel):
    """An ONNX file, run in the event loop: handing over to a thread takes longer than the model."""

    async def load(self) -> bool:
        """Load the file that the settings name."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = self.settings.parameters.uri
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run one request."""
        rows = NumpyCodec.decode_input(payload.inputs[0])
        output = self._session.run(["output"], {"input": rows})[0]
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("output", output)]
        )


async def serve(model: Path, port: int) -> None:
    """Serve until SIGTERM, which MLServer handles."""
    settings = Settings(
        host="127.0.0.1",
        grpc_port=port,
        http_port=0,
        parallel_workers=0,
        metrics_endpoint=None,
        debug=False,
        logging_settings=QUIET,
    )
    digits = ModelSettings(
        name="digits",
        implementation=Digits,
        parameters=ModelParameters(uri=str(model), version="1"),
    )
    await MLServer(settings).start([digits])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Serve a model with MLServer.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="taken like the others' and not used")
    arguments = parser.parse_args()
    install_uvloop_event_loop()
    asyncio.run(serve(arguments.model, arguments.port))


if __name__ == "__main__":
    main()
