"""Every type of tensor, raw and typed, to numpy; and which shapes they have."""

import re
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from kan_bundle.manifest import Datatype, TensorSpec
from protos.inference_pb2 import InferTensorContents, ModelInferRequest
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.errors import InvalidRequest
from serving.tensors import decode_inputs
from tests.wire import raw_output, raw_request, typed_output, typed_request

X = np.linspace(-1.5, 1.5, 8, dtype=np.float32).reshape(2, 4)

VALUES: dict[Datatype, tuple[NDArray[np.generic], InferTensorContents]] = {
    "FP32": (
        np.array([[1.5], [-2.0]], dtype=np.float32),
        InferTensorContents(fp32_contents=[1.5, -2.0]),
    ),
    "INT64": (np.array([[2**40], [-1]]), InferTensorContents(int64_contents=[2**40, -1])),
    "INT32": (
        np.array([[2**30], [-1]], dtype=np.int32),
        InferTensorContents(int_contents=[2**30, -1]),
    ),
    "UINT8": (
        np.array([[255], [0]], dtype=np.uint8),
        InferTensorContents(uint_contents=[255, 0]),
    ),
    "BOOL": (np.array([[True], [False]]), InferTensorContents(bool_contents=[True, False])),
}


def request(
    datatype: str, contents: InferTensorContents | None = None, raw: bytes | None = None
) -> ModelInferRequest:
    tensor = ModelInferRequest.InferInputTensor(
        name="x", datatype=datatype, shape=[2, 1], contents=contents
    )
    return ModelInferRequest(inputs=[tensor], raw_input_contents=[] if raw is None else [raw])


@pytest.mark.parametrize("datatype", VALUES)
def test_every_type_is_read_raw_and_typed(datatype: Datatype) -> None:
    expected, contents = VALUES[datatype]
    spec = TensorSpec("x", datatype, (-1, 1))
    for asked in (request(datatype, contents), request(datatype, raw=expected.tobytes())):
        (found,) = decode_inputs(asked, [spec])
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("datatype", VALUES)
def test_contents_of_another_type_are_refused(datatype: Datatype) -> None:
    others = (contents for name, (_, contents) in VALUES.items() if name != datatype)
    for contents in others:
        with pytest.raises(InvalidRequest, match=f"{datatype} belongs in contents"):
            decode_inputs(request(datatype, contents), [TensorSpec("x", datatype, (-1, 1))])


def test_numbers_beyond_the_type_are_refused() -> None:
    contents = InferTensorContents(uint_contents=[256, 0])
    with pytest.raises(InvalidRequest, match="in the range of UINT8"):
        decode_inputs(request("UINT8", contents), [TensorSpec("x", "UINT8", (-1, 1))])


def test_bytes_that_are_no_booleans_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="bytes of 0 or 1 for BOOL"):
        decode_inputs(request("BOOL", raw=b"\x02\x00"), [TensorSpec("x", "BOOL", (-1, 1))])


@pytest.mark.parametrize("make", [raw_request, typed_request])
@pytest.mark.parametrize("shape", [(-1, 4), (2, -1), (-1, -1), (-7, 4), (2, -(2**40)), (4,)])
def test_which_shape_to_send_in_place_of_unknown_sizes_is_told_and_right(
    stub: GRPCInferenceServiceStub, make: Callable[..., ModelInferRequest], shape: list[int]
) -> None:
    x = X[: 1 if len(shape) == 1 else 2]
    request = make(x)
    request.inputs[0].shape[:] = shape
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    advice = re.fullmatch(r".*, found \[.*\]; .* \[(\d+), (\d+)\]", str(error.value.details()))
    assert advice
    request.inputs[0].shape[:] = map(int, advice.groups())
    expected = raw_output(stub.ModelInfer(raw_request(x)))
    read = raw_output if make is raw_request else typed_output
    np.testing.assert_array_equal(read(stub.ModelInfer(request)), expected)


@pytest.mark.parametrize(
    ("shape", "content", "remedy"),
    [
        ((-1, 4), X.tobytes()[:-1], "; a request says how many rows it has, in place of -1"),
        ((-1, 4), b"", "; a request says how many rows it has, in place of -1"),
        ((-1, 5), X.tobytes(), ""),
        ((4, 2), X.tobytes(), ""),
        ((-1, 2, 2), X.tobytes(), ""),
    ],
)
def test_no_shape_is_made_up(
    stub: GRPCInferenceServiceStub, shape: list[int], content: bytes, remedy: str
) -> None:
    request = raw_request(X)
    request.inputs[0].shape[:] = shape
    request.raw_input_contents[0] = content
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request)
    assert str(error.value.details()).endswith(f"found {list(shape)}{remedy}")
