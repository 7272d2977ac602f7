"""Ray Serve: a cluster of one node with one replica, which answers gRPC itself.

Configured for latency and throughput on two cores: Ray's own switch for throughput, which runs the
model in the replica's event loop and lets the replica listen ("direct ingress"); its proxy, which
cannot be left out, idles on free ports; no dashboard, access log or batching; onnxruntime on one
thread, which does not spin.

Wire: ModelInfer of the Open Inference Protocol over gRPC, raw_input_contents, model `digits`: Ray
takes any service that has generated code, so it gets ours. It listens on every interface.
"""

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path

# The repository instead of this folder, which has a module that is named like the package.
ROOT = str(Path(__file__).resolve().parents[2])
sys.path[0] = ROOT

import numpy as np  # noqa: E402

from protos import inference_pb2 as pb  # noqa: E402

SERVICE = "protos.inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
OBJECT_STORE_BYTES = 80 * 2**20  # the least that it takes; requests do not pass through it


class Digits:
    """An ONNX file; methods are named as the service's calls are."""

    def __init__(self, path: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    async def ModelInfer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:  # noqa: N802
        """Run one request."""
        rows = np.frombuffer(request.raw_input_contents[0], "<f4")
        rows = rows.reshape(request.inputs[0].shape)
        output = self._session.run(["output"], {"input": rows})[0]
        tensor = pb.ModelInferResponse.InferOutputTensor(
            name="output", datatype="FP32", shape=output.shape
        )
        return pb.ModelInferResponse(
            model_name="digits",
            model_version="1",
            id=request.id,
            outputs=[tensor],
            raw_output_contents=[output.tobytes()],
        )


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listen_on(port: int, protocol: str) -> dict[str, str]:
    """Make a range of one port, the end of which is not in it, where replicas listen."""
    name = f"RAY_SERVE_DIRECT_INGRESS_{{}}_{protocol}_PORT"
    return {name.format("MIN"): str(port), name.format("MAX"): str(port + 1)}


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="Serve a model with Ray Serve.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="for its files; sockets limit its length")
    arguments = parser.parse_args()

    # Read when ray is imported, here and in every process that it starts.
    os.environ |= {
        "PYTHONPATH": ROOT,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        **listen_on(arguments.port, "GRPC"),
        **listen_on(free_port(), "HTTP"),
    }
    import ray
    from ray import serve

    stop = threading.Event()
    ray.init(
        num_cpus=2,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=str(arguments.folder.resolve()) if arguments.folder else None,
    )
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    serve.start(
        http_options={"port": free_port()},
        grpc_options={"port": free_port(), "grpc_servicer_functions": [SERVICE]},
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    deployment = serve.deployment(num_replicas=1, max_ongoing_requests=1000)(Digits)
    serve.run(deployment.bind(str(arguments.model.resolve())), route_prefix=None)
    stop.wait()
    ray.shutdown()


if __name__ == "__main__":
    main()
