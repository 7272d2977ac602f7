"""A server of the protocol with nothing behind it, for what a client must bear: any tensors, any
credentials, any answer."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2_grpc
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

A = np.array([[1.5, -2.0], [0.25, 4.0], [0.0, 1.0]], np.float32)
N = np.array([10, 20, 30], np.int64)
_DTYPES = {"FP32": "<f4", "INT64": "<i8", "UINT8": "u1", "BOOL": "?"}


@dataclass
class Bare(GRPCInferenceServiceServicer):
    """One model, `pair`: inputs `a` and `n`, outputs `total` = a + n and `twice` = 2 a.

    Args:
        tokens: Bearer tokens that it takes; None lets anybody in.
        change: What is done to every answer.
        inputs: Types and shapes; without `n`, nothing is added.
        outputs: Those that there are.
    """

    tokens: set[str] | None = None
    change: Callable[[pb.ModelInferResponse], None] = lambda response: None
    inputs: Mapping[str, tuple[str, list[int]]] = field(
        default_factory=lambda: {"a": ("FP32", [-1, 2]), "n": ("INT64", [-1])}
    )
    outputs: tuple[str, ...] = ("total", "twice")
    requests: list[pb.ModelInferRequest] = field(default_factory=list)
    seen: list[Mapping[str, Any]] = field(default_factory=list)

    def _enter(self, context: grpc.ServicerContext) -> None:
        metadata: dict[str, Any] = dict(context.invocation_metadata())
        self.seen.append(metadata)
        taken = {f"Bearer {token}" for token in self.tokens or ()}
        if self.tokens is not None and metadata.get("authorization") not in taken:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not one of ours")

    def ServerLive(
        self, request: pb.ServerLiveRequest, context: grpc.ServicerContext
    ) -> pb.ServerLiveResponse:
        self._enter(context)
        return pb.ServerLiveResponse(live=True)

    def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ModelMetadataResponse:
        self._enter(context)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name="pair",
            versions=["1"],
            inputs=[tensor(name=k, datatype=d, shape=s) for k, (d, s) in self.inputs.items()],
            outputs=[tensor(name=name, datatype="FP32", shape=[-1, 2]) for name in self.outputs],
        )

    def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.ServicerContext
    ) -> pb.ModelInferResponse:
        self._enter(context)
        self.requests.append(request)
        arrays = received(request)
        a, n = arrays["a"], arrays.get("n", np.zeros(len(arrays["a"]), np.int64))
        answers = {"total": (a + n[:, None]).astype("<f4"), "twice": (2 * a).astype("<f4")}
        wanted = [output.name for output in request.outputs] or self.outputs
        response = pb.ModelInferResponse(model_name="pair", model_version="1")
        for name in wanted:
            response.outputs.add(name=name, datatype="FP32", shape=answers[name].shape)
            response.raw_output_contents.append(answers[name].tobytes())
        self.change(response)
        return response


def received(request: pb.ModelInferRequest) -> dict[str, NDArray[Any]]:
    """The tensors of a request."""
    return {
        tensor.name: np.frombuffer(content, _DTYPES[tensor.datatype]).reshape(tensor.shape)
        for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
    }


@contextmanager
def answering(
    servicer: Bare,
    credentials: grpc.ServerCredentials | None = None,
    health: health_pb2_grpc.HealthServicer | None = None,
) -> Iterator[int]:
    """Run it on a free port of 127.0.0.1, which is yielded."""
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        add_GRPCInferenceServiceServicer_to_server(servicer, server)
        if health is not None:
            health_pb2_grpc.add_HealthServicer_to_server(health, server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            yield port
        finally:
            server.stop(None).wait()
