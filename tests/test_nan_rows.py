"""What becomes of NaN in the inputs: in the file, in the manifest, and where a file loses it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import max_pool1d

from export import ParityError, export_module
from export.runtimes import Arrays, Runner, Session, load_onnx
from kan_bundle.manifest import Manifest
from kan_model import KAN, KANLinear
from tests import zoo


class Forecaster(nn.Module):
    """A recurrent network over windows, of which onnxruntime's kernel answers NaN with numbers."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 6, batch_first=True), KANLinear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0][:, -1])
        return y


class StepByStep(nn.Module):
    """Answers every step, so that NaN in one leaves the steps before it as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), KANLinear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0])
        return y


class TwoInputs(nn.Module):
    """One of its inputs goes through a pooling, and one answer does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = KANLinear(3, 2), KANLinear(2, 2)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(a), self.right(max_pool1d(b.unsqueeze(1), 2).squeeze(1))


def export(network: nn.Module, folder: Path, **given: object) -> Manifest:
    torch.manual_seed(0)
    return export_module(network, name="m", output=folder, **given)  # type: ignore[arg-type]


def nodes_of_guard(folder: Path) -> list[str]:
    graph = onnx.load(folder / "m" / "1" / "model.onnx").graph
    return [node.name for node in graph.node if node.name.startswith("nan_guard/")]


def windows() -> NDArray[np.float32]:
    """Windows with NaN in each step and feature in turn, and one without."""
    rows = np.random.default_rng(0).standard_normal((22, 7, 3)).astype(np.float32)
    for i in range(21):
        rows[i, i // 3, i % 3] = np.nan
    return rows


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_window_with_nan_is_answered_by_nan(tmp_path: Path, kind: type[nn.Module]) -> None:
    network = Forecaster(kind).eval()
    manifest = export(network, tmp_path, input_shape=(7, 3))
    assert manifest.lossy_operators
    assert manifest.lossy_operators[0].startswith(kind.__name__)
    assert not manifest.inputs[0].rejects_nan
    rows = windows()
    with torch.no_grad():
        expected = network(torch.from_numpy(rows)).numpy()
    assert np.isnan(expected[:-1]).all()
    for fused in (False, True):
        found = load_onnx(tmp_path / "m" / "1" / "model.onnx", fused=fused)([rows])[0]
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-5, atol=1e-6)


def test_convolutions_with_relu_and_pooling_are_guarded(tmp_path: Path) -> None:
    network = zoo.conv_net().eval()
    manifest = export(network, tmp_path, input_shape=(3, 8, 8))
    assert {name.split()[0] for name in manifest.lossy_operators} <= {"Relu", "MaxPool"}
    assert nodes_of_guard(tmp_path)
    row = np.zeros((1, 3, 8, 8), np.float32)
    row[0, 1, 4, 4] = np.nan
    assert np.isnan(load_onnx(tmp_path / "m" / "1" / "model.onnx")([row])[0]).all()


@pytest.mark.parametrize("network", [KAN([4, 3]), nn.Sequential(KANLinear(4, 3), nn.Tanh())])
def test_where_nothing_loses_nan_there_is_no_guard(tmp_path: Path, network: nn.Module) -> None:
    manifest = export(network, tmp_path, input_shape=4)
    assert manifest.lossy_operators == ()
    assert nodes_of_guard(tmp_path) == []


@pytest.mark.filterwarnings("ignore:rows with NaN in")
def test_where_the_network_answers_part_of_a_row_the_input_rejects_nan(tmp_path: Path) -> None:
    manifest = export(StepByStep(), tmp_path, input_shape=(5, 3))
    assert manifest.inputs[0].rejects_nan
    assert nodes_of_guard(tmp_path) == []
    with np.load(tmp_path / "m" / "1" / "golden.npz") as golden:
        assert not np.isnan(golden["input_0"]).any()


@pytest.mark.filterwarnings("ignore:rows with NaN in")
def test_only_the_inputs_in_which_nan_is_lost_reject_it(tmp_path: Path) -> None:
    manifest = export(TwoInputs(), tmp_path, input_shape={"a": 3, "b": 4})
    assert [spec.rejects_nan for spec in manifest.inputs] == [False, True]


def without_nan_in(run: Runner) -> Runner:
    return lambda inputs: run([np.nan_to_num(x) for x in inputs])


def without_nan_out(run: Runner) -> Runner:
    return lambda inputs: [np.nan_to_num(y) for y in run(inputs)]


@pytest.mark.parametrize("wrap", [without_nan_in, without_nan_out])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(lambda: KAN([4, 3]), (4,), id="a KAN"),
        pytest.param(lambda: nn.Sequential(KANLinear(4, 3), KANLinear(3, 2)), (4,), id="layers"),
        pytest.param(zoo.conv_net, (3, 8, 8), id="layers that lose NaN themselves"),
        pytest.param(lambda: nn.Sequential(KANLinear(3, 2)), (5, 3), id="part of a row"),
    ],
)
def test_a_file_that_loses_nan_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    wrap: Callable[[Runner], Runner],
) -> None:
    def load(path: Path, *, fused: bool = False) -> Session:
        session = load_onnx(path, fused=fused)
        return replace(session, run=wrap(session.run))

    monkeypatch.setattr("export.pipeline.load_onnx", load)
    with pytest.raises(ParityError, match=r"onnxruntime cpu.*at nan"):
        export(make(), tmp_path / "models", input_shape=shape)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda y: [y[0].astype(np.float64)],
            r"expected float32 \(\d+, 3, 4\), found float64",
        ),
        (
            lambda y: [y[0].reshape(len(y[0]), 12)],
            r"\(\d+, 3, 4\), found float32 \(\d+, 12\)",
        ),
        (lambda y: [y[0].astype(np.float64).reshape(len(y[0]), 12)], "found float64"),
        (lambda y: [*y, *y], "expected 1 outputs, found 2"),
        (lambda y: [], "expected 1 outputs, found 0"),
    ],
    ids=["type", "shape", "both", "one more", "none"],
)
def test_types_and_shapes_are_compared_before_values(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Arrays], Arrays],
    message: str,
) -> None:
    network = nn.Sequential(KANLinear(6, 12), nn.Unflatten(1, (3, 4)))

    def load(path: Path, *, fused: bool = False) -> Session:
        session = load_onnx(path, fused=fused)
        return replace(session, run=lambda inputs: change(session.run(inputs)))

    monkeypatch.setattr("export.pipeline.load_onnx", load)
    with pytest.raises(ParityError, match=message):
        export(network, tmp_path / "models", input_shape=6)
    assert not (tmp_path / "models").exists()


def test_names_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, *, fused: bool = False) -> Session:
        return replace(load_onnx(path, fused=fused), output_names=("another",))

    monkeypatch.setattr("export.pipeline.load_onnx", load)
    with pytest.raises(ParityError, match="expected the outputs output, found another"):
        export(KAN([3, 2]), tmp_path / "models")


def test_every_output_and_kind_of_probe_that_is_wrong_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = KANLinear(3, 2), KANLinear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"left": self.left(x), "right": self.right(x)}

    def load(path: Path, *, fused: bool = False) -> Session:
        session = load_onnx(path, fused=fused)
        return replace(session, run=lambda inputs: [y + np.float32(1) for y in session.run(inputs)])

    monkeypatch.setattr("export.pipeline.load_onnx", load)
    with pytest.raises(ParityError) as refused:
        export(Two(), tmp_path / "models", input_shape=3)
    for part in ("left at small", "right at small", "left at knots", "right at normal"):
        assert part in str(refused.value)
