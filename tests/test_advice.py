"""Refusals say what to write instead, and what they say leads to an export."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export import InputError, NetworkError, export_module
from export.inputs import read_inputs
from export.network import Network, describe_network
from kan_model import KANLinear
from tests import zoo
from tests.bundles import CLOSE, run_onnx


def describe(network: nn.Module, shape: Any = None) -> Network:
    return describe_network(network.eval(), read_inputs(shape, None))


def refusal(network: nn.Module, shape: Any = None) -> str:
    with pytest.raises((InputError, NetworkError)) as found:
        describe(network, shape)
    return str(found.value)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.kan = nn.Embedding(9, 4), zoo.KANLinear(4, 2)

    def forward(self, ids: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self.kan(self.embedding(ids).mean(1)) * scale[:, None]
        return y


def test_without_shapes_the_inputs_of_forward_are_named_as_flags() -> None:
    message = refusal(Tokens())
    assert "forward takes ids, scale: " in message
    assert "--input-shape ids=SIZES --input-shape scale=SIZES" in message
    assert "bias" not in message
    assert "forward takes ids, scale: " in refusal(Tokens(), "ids=5")


def test_whole_numbers_given_as_floats_are_corrected_by_flags_that_work() -> None:
    message = refusal(Tokens(), ["ids=5", "scale="])
    flags = re.findall(r"--input-shape (\S+)", message)
    assert flags == ["ids:INT64=5", "scale="]
    assert describe(Tokens(), flags).inputs.specs[0].allowed == (0, 8)


class Stateful(nn.Module):
    """States are (layers, batch, features), as those of LSTM are."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.kan = nn.LSTM(3, 4, num_layers=2, batch_first=True), KANLinear(4, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(x, (h, c))
        return self.kan(y[:, -1]), state


class BatchFirst(nn.Module):
    """What the refusals say, written down."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        found = self.network(x, h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous())
        return found[0], found[1][0].transpose(0, 1), found[1][1].transpose(0, 1)


@pytest.mark.filterwarnings("ignore:onnxruntime gives numbers")
@pytest.mark.filterwarnings("ignore:rows with NaN in")
def test_a_batch_that_comes_second_is_named_with_the_module_to_write(tmp_path: Path) -> None:
    for names in (["x=5,3", "h=2,4", "c=2,4"], ["a=5,3", "b=2,4", "d=2,4"]):
        message = refusal(Stateful(), names)
        assert "in h, c the network has the batch second" in message
        h, c = (f"{name}.transpose(0, 1).contiguous()" for name in "hc")
        assert f"self.network(x, {h}, {c})" in message

    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Stateful()

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            return self.network(x, h.transpose(0, 1), c.transpose(0, 1))

    message = refusal(Returning(), names)
    assert "output_1_0: expected one row for each row" in message
    assert "returns output_1_0.transpose(0, 1)" in message

    torch.manual_seed(0)
    network = BatchFirst(Stateful()).eval()
    shapes = {"x": (5, 3), "h": (2, 4), "c": (2, 4)}
    manifest = export_module(network, name="m", output=tmp_path, input_shape=shapes)
    assert [spec.shape for spec in manifest.outputs] == [(-1, 2), (-1, 2, 4), (-1, 2, 4)]
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((3, *size)).astype(np.float32) for size in shapes.values()]
    with torch.no_grad():
        expected = network(*map(torch.from_numpy, rows))
    for found, right in zip(run_onnx(tmp_path / "m" / "1", *rows), expected, strict=True):
        np.testing.assert_allclose(found, right, **CLOSE)


class Graph(nn.Module):
    """One step of messages along the edges of a graph; rows are nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KANLinear(3, 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        y: Tensor = self.kan(x + torch.zeros_like(x).index_add(0, target, x[source]))
        return y


class OneGraph(nn.Module):
    """Holds the edges, as the refusal of rows for `edge_index` says."""

    edge_index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = Graph()
        self.register_buffer("edge_index", torch.tensor([[0, 1, 2, 3], [1, 2, 3, 1]]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x, self.edge_index)
        return y


class GraphRows(OneGraph):
    """Makes a row of a graph, as the refusal of rows that influence each other says."""

    def forward(self, x: Tensor) -> Tensor:
        batch, nodes = x.shape[:2]
        edges = (self.edge_index[:, None] + nodes * torch.arange(batch)[:, None]).reshape(2, -1)
        y: Tensor = self.network(x.flatten(0, 1), edges)
        return y.reshape(batch, nodes, -1)


def test_the_nodes_of_a_graph_become_one_row(tmp_path: Path) -> None:
    samples: dict[str, NDArray[Any]] = {
        "x": np.zeros((4, 3), np.float32),
        "edge_index": np.zeros((2, 4), np.int64),
    }
    with pytest.raises(InputError, match=r"edge_index of a graph, is no input: .* as a buffer"):
        export_module(Graph(), name="m", output=tmp_path, samples=samples)
    with pytest.raises((InputError, NetworkError), match=r"x\.flatten\(0, 1\) and \(edge_index\["):
        export_module(OneGraph(), name="m", output=tmp_path, samples=np.eye(4, 3, dtype=np.float32))
    torch.manual_seed(0)
    network = GraphRows().eval()
    export_module(network, name="m", output=tmp_path, input_shape=(4, 3))
    x = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x))
    np.testing.assert_allclose(run_onnx(tmp_path / "m" / "1", x)[0], expected, **CLOSE)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), r"0 \(BatchNorm1d\) .* nn\.LayerNorm"),
        (
            nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0),
            r"0\.self_attn \(MultiheadAttention\) has batch_first=False: .* transpose\(0, 1\)",
        ),
    ],
)
def test_what_lets_rows_influence_each_other_is_named(
    tmp_path: Path, part: nn.Module, message: str
) -> None:
    shape = (3,) if isinstance(part, nn.BatchNorm1d) else (5, 3)
    with pytest.raises(NetworkError, match=message):
        export_module(
            nn.Sequential(part, KANLinear(3, 2)), name="m", output=tmp_path, input_shape=shape
        )
