"""Serve the exported digits model and classify the test images over gRPC.

`python -m examples.digits.classify --checkpoint digits.pt --model-repository models` starts a
server of its own on a free port, and stops it. The client below is all that a client needs: the
generated stub, and tensors as raw bytes.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import torch
from numpy.typing import NDArray

from examples.digits.data import load_split
from kan_model import load_checkpoint
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub

MODEL = "digits"
ROWS_PER_REQUEST = 64
TIMED_SECONDS = 2.0


@contextmanager
def server(repository: Path) -> Iterator[str]:
    """Run `python -m serving` on a free port and yield its address."""
    command = [sys.executable, "-m", "serving", "--model-repository", str(repository)]
    with subprocess.Popen(
        [*command, "--grpc-port", "0", "--metrics-port", "0"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:  # ends when the server does
                event = json.loads(line)
                if event["event"] == "listening":
                    # Its log must go on being read: a full pipe would make the server wait.
                    threading.Thread(target=process.stderr.read, daemon=True).start()
                    yield event["grpc"]
                    break
                print(f"  server: {event['event']} {event.get('reason', '')}", file=sys.stderr)
            else:
                raise SystemExit("the server did not start")
        finally:
            process.terminate()
            process.wait()


def classify(stub: GRPCInferenceServiceStub, images: NDArray[np.float32]) -> NDArray[np.int64]:
    """Ask the server for the class of each image.

    Args:
        stub: Connected to the server.
        images: Shape (rows, 64).

    Returns:
        Classes, shape (rows,).
    """
    request = pb.ModelInferRequest(
        model_name=MODEL,
        inputs=[
            pb.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=images.shape)
        ],
        raw_input_contents=[images.astype("<f4").tobytes()],
    )
    response = stub.ModelInfer(request, timeout=10)
    scores = np.frombuffer(response.raw_output_contents[0], dtype="<f4")
    classes: NDArray[np.int64] = scores.reshape(response.outputs[0].shape).argmax(axis=1)
    return classes


def main() -> int:
    """Compare the server with eager PyTorch; exit code 0 if they agree on every image, else 1."""
    parser = argparse.ArgumentParser(description="Classify the digits' test images over gRPC.")
    parser.add_argument("--checkpoint", type=Path, default=Path("digits.pt"), metavar="FILE")
    parser.add_argument("--model-repository", type=Path, default=Path("models"), metavar="DIR")
    arguments = parser.parse_args()

    _, images, _, labels = load_split()
    with torch.no_grad():
        network = load_checkpoint(arguments.checkpoint)
        eager = network(torch.from_numpy(images)).argmax(1).numpy()

    batches = [images[i : i + ROWS_PER_REQUEST] for i in range(0, len(images), ROWS_PER_REQUEST)]
    with server(arguments.model_repository) as address, grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        served = np.concatenate([classify(stub, batch) for batch in batches])
        rows, started = 0, time.perf_counter()
        while time.perf_counter() - started < TIMED_SECONDS:
            for batch in batches:
                rows += len(classify(stub, batch))
        rows_per_second = rows / (time.perf_counter() - started)

    agreed = int((served == eager).sum())
    print(f"test images           {len(images)}")
    print(f"accuracy over gRPC    {(served == labels).mean():.2%}")
    print(f"accuracy of eager     {(eager == labels).mean():.2%}")
    print(f"same class on         {agreed} of {len(images)} images")
    print(
        f"rows per second       {rows_per_second:,.0f} (one client, {ROWS_PER_REQUEST} a request)"
    )
    return 0 if agreed == len(images) else 1


if __name__ == "__main__":
    sys.exit(main())
