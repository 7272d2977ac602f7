"""Tensors of one number a row, shape (N,): in the manifest, in config.pbtxt, on the wire."""

from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from google.protobuf import text_format
from torch import Tensor, nn

from export import InputError, export_module
from export.inputs import read_inputs
from export.triton import render_config
from kan_bundle.manifest import TensorSpec
from kan_model import KAN, KANLinear
from protos import model_config_pb2
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import running
from serving.settings import Settings
from tests.bundles import CLOSE
from tests.wire import infer_request, raw_output


@pytest.mark.parametrize("shape", ["t:INT64=", "t:INT64=batch", {"t:INT64": ()}, ["t:int64="]])
def test_an_empty_size_is_one_number_a_row(shape: object) -> None:
    found = read_inputs(shape, None)  # type: ignore[arg-type]
    assert found is not None
    assert found.specs == (TensorSpec("t", "INT64", (-1,)),)


@pytest.mark.parametrize("shape", ["", "=", "t:INT64", ":INT64="])
def test_a_size_without_a_name_is_not_empty(shape: str) -> None:
    with pytest.raises(InputError):
        read_inputs(shape, None)


def test_triton_gets_a_size_and_a_reshape() -> None:
    inputs = [TensorSpec("x", "FP32", (-1, 3)), TensorSpec("t", "INT64", (-1,))]
    text = render_config("m", inputs, [TensorSpec("score", "FP32", (-1,))])
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    x, t = config.input
    (score,) = config.output
    assert (list(x.dims), x.HasField("reshape")) == ([3], False)
    for tensor in (t, score):  # Triton refuses dims that are empty
        assert list(tensor.dims) == [1]
        assert tensor.HasField("reshape")
        assert list(tensor.reshape.shape) == []


class Scored(nn.Module):
    """A whole number a row in, a score out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix, self.kan = nn.Embedding(20, 3), KANLinear(3, 3), KAN([3, 1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.kan(self.mix(x) + self.embedding(t)).squeeze(-1)
        return y


def test_one_number_a_row_is_exported_and_served(tmp_path: Path) -> None:
    network = Scored().eval()
    manifest = export_module(
        network, name="m", output=tmp_path, input_shape={"x": 3, "t:INT64": ()}
    )
    assert [(s.shape, s.allowed) for s in manifest.inputs] == [((-1, 3), None), ((-1,), (0, 19))]
    assert manifest.outputs == (TensorSpec("output", "FP32", (-1,)),)
    text = (tmp_path / "m" / "config.pbtxt").read_text()
    assert text_format.Parse(text, model_config_pb2.ModelConfig()).output[0].dims == [1]
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    t = np.array([0, 19, 7, 7])
    with torch.no_grad():
        expected = network(torch.from_numpy(x), torch.from_numpy(t)).numpy()
    settings = Settings(model_repository=tmp_path, grpc_port=0, metrics_port=0)
    with running(settings) as server, grpc.insecure_channel(server.address) as channel:
        response = GRPCInferenceServiceStub(channel).ModelInfer(
            infer_request("m", {"x": x, "t": t})
        )
    np.testing.assert_allclose(raw_output(response), expected, **CLOSE)
    assert list(response.outputs[0].shape) == [4]
