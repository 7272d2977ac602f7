"""What a user of tritonclient does, run by test_tritonclient.py in tritonclient's own environment.

Arguments: the server's address, a model's name, an .npz with `x`. Prints JSON.
"""

import json
import sys

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException


def infer(client, model, x, **options):
    tensor = triton.InferInput("input", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return client.infer(model, [tensor], **options).as_numpy("output")


async def infer_aio(address, model, x):
    async with triton_aio.InferenceServerClient(address) as client:
        tensor = triton_aio.InferInput("input", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        return (await client.infer(model, [tensor])).as_numpy("output")


def refused(call):
    try:
        call()
    except InferenceServerException as error:
        return error.status()
    return "accepted"


def main():
    import asyncio

    address, model, samples = sys.argv[1:]
    x = np.load(samples)["x"]
    client = triton.InferenceServerClient(address)
    config = client.get_model_config(model, as_json=True)["config"]
    print(
        json.dumps(
            {
                "live": client.is_server_live(),
                "ready": client.is_server_ready(),
                "model_ready": client.is_model_ready(model),
                "version_ready": client.is_model_ready(model, "1"),
                "server": client.get_server_metadata(as_json=True),
                "model": client.get_model_metadata(model, as_json=True),
                "config_name": config["name"],
                "max_batch_size": config["max_batch_size"],
                "y": infer(client, model, x).tolist(),
                "y_named_output": infer(
                    client,
                    model,
                    x,
                    outputs=[triton.InferRequestedOutput("output")],
                    model_version="1",
                    request_id="7",
                    client_timeout=30,
                ).tolist(),
                "y_gzip": infer(client, model, x, compression_algorithm="gzip").tolist(),
                "y_aio": asyncio.run(infer_aio(address, model, x)).tolist(),
                "unknown_model": refused(lambda: infer(client, "nope", x)),
                "unknown_version": refused(lambda: infer(client, model, x, model_version="9")),
                "wrong_width": refused(lambda: infer(client, model, x[:, :-1])),
                "wrong_type": refused(
                    lambda: client.infer(
                        model,
                        [
                            triton.InferInput("input", list(x.shape), "FP64").set_data_from_numpy(
                                x.astype(np.float64)
                            )
                        ],
                    )
                ),
                "statistics": refused(lambda: client.get_inference_statistics(model)),
            }
        )
    )


if __name__ == "__main__":
    main()
