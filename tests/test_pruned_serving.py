"""What the server says of a version whose edges are not all there."""

import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

from export import export_module
from export.report import Report
from kan_model import KAN
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from tests import oracle
from tests.conftest import STATE_DICTS
from tests.servers import served
from tests.wire import raw_output, raw_request


@pytest.fixture
def pruned(tmp_path: Path, quiet: Report) -> KAN:
    """A KAN with two edges that hardly matter, of eight, exported without them as `m`."""
    torch.manual_seed(0)
    kan = KAN([3, 2, 1])
    with torch.no_grad():
        for layer in kan.layers:
            nn.init.normal_(layer.spline_weight)
        for edge in ((0, 0), (1, 2)):
            kan.layers[0].base_weight[edge] *= 1e-6
            kan.layers[0].spline_weight[edge] *= 1e-6
    export_module(kan, name="m", output=tmp_path, prune=0.01, report=quiet)
    return kan


def test_a_pruned_version_says_so(pruned: KAN, tmp_path: Path) -> None:
    with served(tmp_path) as (server, stub):
        properties = stub.ModelMetadata(pb.ModelMetadataRequest(name="m")).properties
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as response:
            text = response.read().decode()
        x = np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32)
        found = raw_output(stub.ModelInfer(raw_request(x, "m")))
    assert (properties["prune_threshold"], properties["pruned_edges"]) == ("0.01", "2 of 8")
    (info,) = (
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "kanserve_model_info"
    )
    assert info.labels["prune_threshold"] == "0.01"
    # And it is what those edges, of a millionth of the others, leave of the network.
    state = {key: value.double().numpy() for key, value in pruned.state_dict().items()}
    assert np.abs(found - oracle.kan(state, x.astype(np.float64), oracle.silu)).max() < 1e-4


def test_a_version_with_all_its_edges_says_nothing_of_pruning(
    stub: GRPCInferenceServiceStub,
) -> None:
    request = pb.ModelMetadataRequest(name=STATE_DICTS[0].name)
    properties = stub.ModelMetadata(request).properties
    assert (properties["prune_threshold"], properties["pruned_edges"]) == ("", "")
