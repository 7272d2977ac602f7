"""Building requests and reading responses as a client would, with the generated messages alone.

And a field as protobuf writes it, for what is no message of theirs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos import inference_pb2 as pb


def raw_request(
    x: NDArray[np.float32],
    model: str = "uniform_4x8x3",
    *,
    model_version: str = "",
    id: str = "",
) -> pb.ModelInferRequest:
    """A request with raw bytes, as tritonclient sends it."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=x.shape)
    return pb.ModelInferRequest(
        model_name=model,
        model_version=model_version,
        id=id,
        inputs=[tensor],
        raw_input_contents=[x.astype("<f4").tobytes()],
    )


def typed_request(x: NDArray[np.float32], model: str = "uniform_4x8x3") -> pb.ModelInferRequest:
    """A request with typed contents, as a hand-written client may send it."""
    return pb.ModelInferRequest(
        model_name=model,
        inputs=[
            pb.ModelInferRequest.InferInputTensor(
                name="input",
                datatype="FP32",
                shape=x.shape,
                contents=pb.InferTensorContents(fp32_contents=x.ravel().tolist()),
            )
        ],
    )


def raw_output(response: pb.ModelInferResponse) -> NDArray[np.float32]:
    """The one output of a response to a raw request."""
    (tensor,), (content,) = response.outputs, response.raw_output_contents
    assert not tensor.HasField("contents")
    array: NDArray[np.float32] = np.frombuffer(content, dtype="<f4").reshape(tensor.shape)
    return array


def typed_output(response: pb.ModelInferResponse) -> NDArray[np.float32]:
    """The one output of a response to a typed request."""
    (tensor,) = response.outputs
    assert not response.raw_output_contents
    values = np.array(tensor.contents.fp32_contents, dtype=np.float32)
    return values.reshape(tensor.shape)


_TYPES = {"f": ("FP32", "fp32_contents"), "i": ("INT64", "int64_contents")}


def infer_request(
    model: str, inputs: Mapping[str, NDArray[Any]], *, typed: bool = False
) -> pb.ModelInferRequest:
    """A request with several inputs."""
    request = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        datatype, field = _TYPES[array.dtype.kind]
        tensor = request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if typed:
            getattr(tensor.contents, field).extend(array.ravel().tolist())
        else:
            request.raw_input_contents.append(array.tobytes())
    return request


def outputs_of(response: pb.ModelInferResponse) -> dict[str, NDArray[np.float32]]:
    """Every output of a response, in whichever form it came."""
    found = {}
    for i, tensor in enumerate(response.outputs):
        if response.raw_output_contents:
            values = np.frombuffer(response.raw_output_contents[i], dtype="<f4")
        else:
            values = np.array(tensor.contents.fp32_contents, dtype=np.float32)
        found[tensor.name] = values.reshape(tensor.shape)
    return found


def part(number: int, content: bytes, *, size: int | None = None) -> bytes:
    """A field of bytes, as protobuf writes it."""
    size = len(content) if size is None else size
    digits = [size >> shift & 127 for shift in range(0, 35, 7)]
    return bytes([number << 3 | 2, *(digit | 128 for digit in digits[:-1]), digits[-1]]) + content
