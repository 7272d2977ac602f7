"""The main job, end to end, on real data."""

from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import pytest
import torch

from examples.digits.data import load_split
from examples.digits.train import train
from export import export_checkpoint
from export.runtimes import load_torchscript
from kan_model import load_checkpoint
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import running
from serving.settings import Settings
from tests.wire import raw_output, raw_request


def test_digits_are_classified_alike_by_eager_onnx_torchscript_and_grpc(
    tmp_path: Path,
) -> None:
    network, accuracy = train()
    assert accuracy >= 0.96
    torch.save(network.state_dict(), tmp_path / "digits.pt")
    export_checkpoint(tmp_path / "digits.pt", output=tmp_path / "models", activation="silu")
    folder = tmp_path / "models" / "digits" / "1"

    _, images, _, labels = load_split()
    with torch.no_grad():
        eager = load_checkpoint(tmp_path / "digits.pt")(torch.from_numpy(images)).argmax(1).numpy()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    settings = Settings(model_repository=tmp_path / "models", grpc_port=0, metrics_port=0)
    with running(settings) as server, grpc.insecure_channel(server.address) as channel:
        response = GRPCInferenceServiceStub(channel).ModelInfer(raw_request(images, "digits"))
    classes = {
        "onnx": session.run(["output"], {"input": images})[0].argmax(1),
        "torchscript": load_torchscript(folder / "model.ts")([images])[0].argmax(1),
        "grpc": raw_output(response).argmax(1),
    }
    for found in classes.values():
        np.testing.assert_array_equal(found, eager)
    assert (eager == labels).mean() == pytest.approx(accuracy)


def test_convolutions_with_a_kan_head_are_exported_and_served(tmp_path: Path) -> None:
    network, accuracy = train("conv")
    assert accuracy >= 0.97
    torch.save({"epoch": 40, "model_state_dict": network.state_dict()}, tmp_path / "conv.pt")
    manifest = export_checkpoint(
        tmp_path / "conv.pt",
        output=tmp_path / "models",
        model="examples.digits.train:conv_kan",
        input_shape=(1, 8, 8),
    )
    assert [(layer.name, layer.in_features) for layer in manifest.layers] == [("9", 128)]
    assert (manifest.inputs[0].shape, manifest.outputs[0].shape) == ((-1, 1, 8, 8), (-1, 10))

    _, test_x, _, labels = load_split()
    images = test_x.reshape(-1, 1, 8, 8)
    with torch.no_grad():
        eager = network(torch.from_numpy(images)).numpy()
    settings = Settings(model_repository=tmp_path / "models", grpc_port=0, metrics_port=0)
    with running(settings) as server, grpc.insecure_channel(server.address) as channel:
        response = GRPCInferenceServiceStub(channel).ModelInfer(raw_request(images, "conv"))
    served = raw_output(response)
    assert (np.abs(served - eager) <= 2e-5 * np.maximum(1, np.abs(eager))).all()  # two float32 sums
    assert (served.argmax(1) == labels).mean() == pytest.approx(accuracy)
