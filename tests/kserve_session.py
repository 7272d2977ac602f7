"""What users of KServe's Python client do, run by test_kserve.py in its own environment.

Arguments: the server's address, a model, an .npz with `x`. Prints JSON.
"""

import asyncio
import json
import logging
import sys

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.infer_type import RequestedOutput


def request(model, x, *, raw=True, **options):
    tensor = InferInput("input", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=raw)
    return InferRequest(model, [tensor], **options)


async def refusal(call):
    try:
        await call
    except grpc.RpcError as error:
        return [error.code().name, error.details()]
    return ["OK", ""]


async def session(address, model, x):
    async with InferenceGRPCClient(address, retries=2, timeout=60) as client:
        raw = await client.infer(request(model, x, request_id="7"))
        typed = await client.infer(request(model, x, raw=False), timeout=30)
        chosen = await client.infer(
            request(
                model,
                x,
                model_version="1",
                request_outputs=[RequestedOutput("output")],
                parameters={"kanserve_details": True},
            ),
            headers=[("x-of-no-meaning", "here")],
        )
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model_ready": await client.is_model_ready(model),
            "id": raw.id,
            "version": chosen.model_version,
            "details": sorted(chosen.parameters),
            "y": [answer.outputs[0].as_numpy().tolist() for answer in (raw, typed, chosen)],
            "readiness of no model": await refusal(client.is_model_ready("nope")),
            "unknown model": await refusal(client.infer(request("nope", x))),
            "wrong width": await refusal(client.infer(request(model, x[:, :-1]))),
            "parameter": await refusal(
                client.infer(request(model, x, parameters={"temperature": 1}))
            ),
        }


def main():
    logging.disable()  # its client logs what it raises
    address, model, samples = sys.argv[1:]
    print(json.dumps(asyncio.run(session(address, model, np.load(samples)["x"]))))


if __name__ == "__main__":
    main()
