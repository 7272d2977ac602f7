"""The floor: what gRPC in Python costs when a server does nothing. Runs in our own environment.

Runs grpcio's synchronous server with `--threads` threads, with `--asyncio` its asyncio server, or
with `--completion-queue` our own way to its core. A handler takes a request as bytes, does not
parse it, and answers every one with the same bytes: a response of the right shape, zeros in it,
serialised once. So what any server built on grpcio adds is its parsing, its model and its answer.

Wire: /inference.GRPCInferenceService/ModelInfer of the Open Inference Protocol. Every other call
of the service is refused. `--rows` has to be what the client sends.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

# The repository instead of this folder, whose modules are named like the rivals' own.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from protos import inference_pb2 as pb  # noqa: E402

SIGNALS = {signal.SIGTERM, signal.SIGINT}
OPTIONS = [("grpc.max_receive_message_length", -1)]
METHOD = "/inference.GRPCInferenceService/ModelInfer"


class Echo(grpc.GenericRpcHandler):
    """Answers every ModelInfer with the same bytes.

    Args:
        behavior: Gives the answer to a request and its context.
    """

    def __init__(self, behavior: Callable[[bytes, Any], Any]) -> None:
        # Without a serializer, gRPC hands over bytes and takes bytes.
        self._handler = grpc.unary_unary_rpc_method_handler(behavior)

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        """Give the handler of a call; None refuses it."""
        return self._handler if handler_call_details.method == METHOD else None


def response(rows: int, outputs: int) -> bytes:
    """Serialise the answer: zeros of shape (rows, outputs)."""
    tensor = pb.ModelInferResponse.InferOutputTensor(
        name="output", datatype="FP32", shape=[rows, outputs]
    )
    return pb.ModelInferResponse(
        model_name="digits",
        model_version="1",
        outputs=[tensor],
        raw_output_contents=[bytes(4 * rows * outputs)],
    ).SerializeToString()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="Answer ModelInfer without doing anything.")
    parser.add_argument("--model", type=Path, help="taken like the others' and not read")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="taken like the others' and not used")
    parser.add_argument("--rows", type=int, default=1, help="of a response")
    parser.add_argument("--outputs", type=int, default=10, help="columns of a response")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--asyncio", action="store_true")
    parser.add_argument("--completion-queue", action="store_true")
    arguments = parser.parse_args()

    # Blocked before gRPC starts threads, which inherit it: only sigwait below sees them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    address = f"127.0.0.1:{arguments.port}"
    answer = response(arguments.rows, arguments.outputs)
    if arguments.asyncio:
        asyncio.run(serve_asyncio(address, answer))
    elif arguments.completion_queue:
        serve_completion_queue(address, answer)
    else:
        serve(address, answer, arguments.threads)


def serve(address: str, answer: bytes, threads: int) -> None:
    """Answer from threads."""
    server = grpc.server(ThreadPoolExecutor(threads), options=OPTIONS)
    server.add_generic_rpc_handlers([Echo(lambda request, context: answer)])
    server.add_insecure_port(address)
    server.start()
    signal.sigwait(SIGNALS)
    server.stop(grace=None).wait()


def serve_completion_queue(address: str, answer: bytes) -> None:
    """Answer from the thread that reads a completion queue, with nothing that limits callers."""
    from serving.failures import INTERNAL
    from serving.gate import Gate
    from serving.room import Room
    from serving.transport.completion_queue import CompletionQueueTransport
    from serving.transport.unary import UnaryMethod

    gate = Gate(Room(2**16, 60.0), lambda caller: None, lambda error: INTERNAL, lambda: 0.0, 2**31)
    method = UnaryMethod(gate, lambda message, call: call.answer(answer))
    server = grpc.server(ThreadPoolExecutor(1), options=OPTIONS)
    transport = CompletionQueueTransport(server, {METHOD: method}, {})
    server.add_insecure_port(address)
    server.start()
    transport.start()
    signal.sigwait(SIGNALS)
    server.stop(grace=None).wait()


async def serve_asyncio(address: str, answer: bytes) -> None:
    """Answer from an event loop."""

    async def behavior(request: bytes, context: Any) -> bytes:
        return answer

    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers([Echo(behavior)])
    server.add_insecure_port(address)
    await server.start()
    await asyncio.to_thread(signal.sigwait, SIGNALS)
    await server.stop(grace=None)


if __name__ == "__main__":
    main()
