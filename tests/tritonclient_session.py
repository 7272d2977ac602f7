"""What users of tritonclient do, run by test_tritonclient.py in tritonclient's own environment.

Argument: JSON with the server's `address`, `channel` (more arguments of the client) and `samples`
(model to .npz with `x`). Prints JSON: for each function below, by its name, what it returned.
"""

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Queue

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf.json_format import MessageToJson
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

PATIENCE_S = 60
COMPRESSIONS = (None, "gzip", "deflate")


class Session:
    """What every part of the session works with."""

    def __init__(self, address, channel, samples):
        self.connect = partial(triton.InferenceServerClient, address, **channel)
        self.connect_aio = partial(triton_aio.InferenceServerClient, address, **channel)
        self.samples = {model: np.load(path)["x"] for model, path in samples.items()}
        self.model, self.x = next(iter(self.samples.items()))
        self.client = self.connect()

    def infer(self, x=None, **options):
        return self.client.infer(self.model, inputs(self.x if x is None else x), **options)


def inputs(x, name="input"):
    tensor = triton.InferInput(name, list(x.shape), np_to_triton_dtype(x.dtype))
    tensor.set_data_from_numpy(x)
    return [tensor]


def refusal(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except InferenceServerException as error:
        return [str(error.status()).removeprefix("StatusCode."), error.message()]
    return ["OK", ""]


def server(session):
    client = session.client
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(session.model),
        "version_ready": client.is_model_ready(session.model, "1"),
        "metadata": client.get_server_metadata(as_json=True),
    }


def model(session):
    """Every description, as a message and as JSON."""
    client = session.client
    found = {}
    for name, call in {
        "metadata": client.get_model_metadata,
        "config": client.get_model_config,
        "statistics": client.get_inference_statistics,
    }.items():
        found[name] = call(session.model, as_json=True)
        message = MessageToJson(call(session.model), preserving_proto_field_name=True)
        assert json.loads(message) == found[name], name
    return found


def answers(session):
    """Every model, with every compression, from a client and from one of asyncio."""

    async def from_aio(model, x, compression):
        async with session.connect_aio() as client:
            result = await client.infer(model, inputs(x), compression_algorithm=compression)
            return result.as_numpy("output").tolist()

    found = {}
    for model, x in session.samples.items():
        found[model] = []
        for compression in COMPRESSIONS:
            result = session.client.infer(model, inputs(x), compression_algorithm=compression)
            found[model].append(result.as_numpy("output").tolist())
            found[model].append(asyncio.run(from_aio(model, x, compression)))
    return found


def options(session):
    result = session.infer(
        outputs=[triton.InferRequestedOutput("output")],
        model_version="1",
        request_id="7",
        priority=0,
        timeout=PATIENCE_S * 10**6,
        client_timeout=PATIENCE_S,
        headers={"x-of-no-meaning": "here"},
        parameters={"kanserve_details": True},
    )
    response = result.get_response()
    return {
        "id": response.id,
        "version": response.model_version,
        "y": result.as_numpy("output").tolist(),
        "parameters": sorted(response.parameters),
    }


def callbacks(session):
    """Requests of `async_infer`, whose answers come to a callback."""
    found = Queue()
    for number in range(20):
        session.client.async_infer(
            session.model,
            inputs(session.x[: number % 5]),
            lambda result, error: found.put((result.get_response().id, error)),
            request_id=str(number),
        )
    ended = [found.get(timeout=PATIENCE_S) for _ in range(20)]
    return sorted((int(number), error) for number, error in ended)


def shared_channel(session):
    """Six clients at once: gRPC has them share a connection, as Triton's C++ client does itself."""
    clients = [session.connect() for _ in range(6)]

    def one(number):
        rows = number % len(session.x)
        result = clients[number % len(clients)].infer(
            session.model, inputs(session.x[rows : rows + 1]), request_id=str(number)
        )
        assert result.get_response().id == str(number)
        return [rows, *result.as_numpy("output")[0].tolist()]

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(one, range(60)))
    for client in clients:
        client.close()
    return found


def requests_of_a_stream(session):
    """Good and bad ones, in an order that shows."""
    bad = session.x[:, :-1]
    return [bad if number % 5 == 3 else session.x[: number % 7] for number in range(30)]


def streamed(result, error):
    if error is not None:
        return error.message()
    response = result.get_response()
    return [response.id, len(result.as_numpy("output")), sorted(response.parameters)]


def stream(session):
    found = Queue()
    session.client.start_stream(
        lambda result, error: found.put(streamed(result, error)), compression_algorithm="gzip"
    )
    requests = requests_of_a_stream(session)
    for number, x in enumerate(requests):
        session.client.async_stream_infer(
            session.model,
            inputs(x),
            request_id=str(number),
            enable_empty_final_response=number % 2 == 0,
        )
    session.client.stop_stream()  # which waits for the answers
    return [found.get(timeout=PATIENCE_S) for _ in requests]


def stream_aio(session):
    async def requests():
        for number, x in enumerate(requests_of_a_stream(session)):
            yield {
                "model_name": session.model,
                "inputs": inputs(x),
                "request_id": str(number),
            }

    async def answers():
        async with session.connect_aio() as client:
            responses = client.stream_infer(requests(), compression_algorithm="deflate")
            return [streamed(result, error) async for result, error in responses]

    return asyncio.run(answers())


def strict_stream(session):
    """With Triton's header the first error ends the stream with its status."""
    found = Queue()
    session.client.start_stream(
        lambda result, error: found.put(error), headers={"triton_grpc_error": "true"}
    )
    session.client.async_stream_infer("nope", inputs(session.x))
    error = found.get(timeout=PATIENCE_S)
    session.client.stop_stream()
    return [str(error.status()), error.message()]


def refusals(session):
    """What is wrong, and what is not offered."""
    client, x = session.client, session.x
    scores = triton.InferRequestedOutput("output", class_count=2)
    shared = triton.InferInput("input", list(x.shape), "FP32")
    shared.set_shared_memory("region", x.nbytes)
    shared_output = triton.InferRequestedOutput("output")
    shared_output.set_shared_memory("region", x.nbytes)
    infer = partial(refusal, session.infer)
    return {
        "unknown model": refusal(client.infer, "nope", inputs(x)),
        "unknown version": infer(model_version="9"),
        "wrong width": infer(x[:, :-1]),
        "wrong type": infer(x.astype(np.float64)),
        "no time": infer(timeout=1),
        "classification": infer(outputs=[scores]),
        "shared memory": refusal(client.infer, session.model, [shared]),
        "shared memory of an output": infer(outputs=[shared_output]),
        "sequence": infer(sequence_id=7, sequence_start=True),
        "named sequence": infer(sequence_id="seven"),
        "priority": infer(priority=1),
        "parameter": infer(parameters={"temperature": 1}),
        "readiness of no model": refusal(client.is_model_ready, "nope"),
        "statistics of no model": refusal(client.get_inference_statistics, "nope"),
        "SystemSharedMemoryStatus": refusal(client.get_system_shared_memory_status),
        "SystemSharedMemoryRegister": refusal(
            client.register_system_shared_memory, "region", "/region", 64
        ),
        "SystemSharedMemoryUnregister": refusal(client.unregister_system_shared_memory),
        "CudaSharedMemoryStatus": refusal(client.get_cuda_shared_memory_status),
        "CudaSharedMemoryRegister": refusal(
            client.register_cuda_shared_memory, "region", b"aGFuZGxl", 0, 64
        ),
        "CudaSharedMemoryUnregister": refusal(client.unregister_cuda_shared_memory),
        "TraceSetting": refusal(client.get_trace_settings),
        "LogSettings": refusal(client.get_log_settings),
        "load with a configuration": refusal(client.load_model, session.model, config="{}"),
    }


def administration(session):
    """Unload and load a model; the last of them, so that nothing else misses it."""
    client, model = session.client, list(session.samples)[-1]

    def states():
        index = client.get_model_repository_index(as_json=True)["models"]
        return {entry["name"]: entry["state"] for entry in index}

    found = [states()]
    client.unload_model(model)
    found += [states(), client.is_model_ready(model)]
    client.load_model(model)
    return {"model": model, "found": [*found, states(), client.is_model_ready(model)]}


def protocol(_):
    """The protocol as tritonclient has it: methods, and fields of every message."""

    def fields(message):
        return {
            field.name: [field.number, field.type, getattr(field.message_type, "full_name", None)]
            for field in message.fields
        }

    def messages(found):
        for message in found:
            yield message.full_name, fields(message)
            yield from messages(message.nested_types)

    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    described = [
        *service_pb2.DESCRIPTOR.message_types_by_name.values(),
        *model_config_pb2.DESCRIPTOR.message_types_by_name.values(),
    ]
    return {
        "methods": [method.name for method in service.methods],
        "messages": dict(messages(described)),
        "datatypes": dict(model_config_pb2.DataType.items()),
    }


def main():
    session = Session(**json.loads(sys.argv[1]))
    parts = (
        server,
        answers,
        options,
        callbacks,
        shared_channel,
        stream,
        stream_aio,
        strict_stream,
        refusals,
        administration,
        protocol,
        model,
    )
    print(json.dumps({part.__name__: part(session) for part in parts}))


if __name__ == "__main__":
    main()
