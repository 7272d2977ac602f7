"""Scores by targets: checkpoint and files side by side, in terminal, page and manifest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export import InputError, export_module
from export.answers import read_answers
from export.inputs import read_inputs
from export.network import describe_network
from export.report import Report
from export.runtimes import load_onnx
from export.scoring import score_network
from kan_bundle.manifest import read_manifest
from kan_bundle.scores import TargetsRecord
from kan_model import KAN
from tests import oracle
from tests.conftest import run_export
from tests.edges import arrays, pruned, uneven, within


def undecided(widths: list[int]) -> KAN:
    """A KAN that gives every label, some of them by edges that count little."""
    torch.manual_seed(0)
    kan = KAN(widths)
    with torch.no_grad():
        for layer in kan.layers:
            nn.init.normal_(layer.spline_weight)
            layer.spline_scaler.copy_(10 ** -(1.5 * torch.rand_like(layer.spline_scaler)))
            layer.base_weight.zero_()
    return kan


def scored(module: nn.Module, x: Any, targets: Any) -> tuple[TargetsRecord, ...]:
    inputs = read_inputs(None, x)
    answers = read_answers(None, targets, inputs)
    assert answers is not None
    return score_network(describe_network(module.eval(), inputs), answers, "checkpoint")


def test_accuracy_is_the_share_of_rows_with_the_right_largest_output() -> None:
    kan = uneven([4, 6, 3])
    x = within(kan, 101)
    y = oracle.kan(arrays(kan), x, oracle.silu)
    labels = np.random.default_rng(0).integers(0, 3, 101)
    for given in (labels, labels[:, None], labels.astype(np.uint8), labels.tolist()):
        targets = np.asarray(given)
        (record,) = scored(kan, x, targets)
        (score,) = record.scores
        assert score.accuracy == pytest.approx((y.argmax(axis=1) == labels).mean(), rel=1e-15)
        assert (record.output, record.rows, score.rmse, score.mae) == ("output", 101, None, None)


def test_errors_are_root_mean_square_and_mean_magnitude() -> None:
    kan = uneven([4, 6, 2])
    x = within(kan, 50)
    y = oracle.kan(arrays(kan), x, oracle.silu)
    targets = y + np.random.default_rng(0).normal(size=y.shape)
    (score,) = scored(kan, x, targets)[0].scores
    assert score.rmse == pytest.approx(np.sqrt(((y - targets) ** 2).mean()), rel=1e-9)
    assert score.mae == pytest.approx(np.abs(y - targets).mean(), rel=1e-9)
    assert score.accuracy is None


def test_rows_without_numbers_are_counted() -> None:
    kan = uneven([4, 6, 2])
    x = within(kan, 10)
    y = oracle.kan(arrays(kan), x, oracle.silu)
    x[[2, 5], 0] = np.nan
    (score,) = scored(kan, x, y.argmax(axis=1))[0].scores
    assert (score.accuracy, score.not_finite) == (0.8, 2)
    (score,) = scored(kan, x, y + 1)[0].scores
    assert [score.rmse, score.mae] == pytest.approx([1, 1])
    assert score.not_finite == 2
    x[:] = np.nan
    (score,) = scored(kan, x, y)[0].scores
    assert (score.rmse, score.mae, score.not_finite) == (None, None, 10)


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"prune": 0.1}], ids=str)
def test_files_are_scored_beside_the_checkpoint(
    tmp_path: Path, quiet: Report, options: dict[str, Any]
) -> None:
    kan = undecided([4, 6, 3])
    x = within(kan, 60)
    y = oracle.kan(arrays(kan), x, oracle.silu)
    labels = y.argmax(axis=1)
    targets = {"targets": labels} if "prune" in options else {"targets": y + 0.25}
    export_module(kan, name="m", output=tmp_path, samples=x, report=quiet, **targets, **options)
    folder = tmp_path / "m" / "1"
    manifest = read_manifest(folder)
    (record,) = manifest.targets
    runtimes = [parity.runtime for parity in manifest.parity if parity.runtime != "eager"]
    assert [score.runtime for score in record.scores] == ["checkpoint", *runtimes]
    found = load_onnx(folder / "model.onnx")([x])[0]
    page = (folder / "report.html").read_text()
    if "prune" in options:
        expected = pruned(kan, 0.1, x, torch.from_numpy(x)).argmax(axis=1) == labels
        assert 0.3 < expected.mean() < 1
        assert [score.accuracy for score in record.scores] == [1.0] + [expected.mean()] * (
            len(runtimes)
        )
        assert '<th scope="col" class="num">Accuracy</th>' in page
        assert ">100 %</td>" in page
    else:
        assert record.scores[0].rmse == pytest.approx(0.25, rel=1e-6)
        own = record.scores[1]
        assert own.rmse == pytest.approx(np.sqrt(((found - y - 0.25) ** 2).mean()), rel=1e-5)
        assert own.mae == pytest.approx(np.abs(found - y - 0.25).mean(), rel=1e-5)
        assert own.rmse != record.scores[0].rmse
        assert f">{own.rmse:.4g}</td>" in page
    shown = quiet._console.file.getvalue()  # type: ignore[attr-defined]
    assert "By the targets, on 60 rows of the samples" in shown
    assert shown.index("checkpoint  ") < shown.index("onnxruntime cpu  ", shown.index("By the"))


def test_inspect_shows_the_score_at_every_threshold(tmp_path: Path) -> None:
    kan = undecided([5, 7, 3])
    x = within(kan, 60)
    labels = oracle.kan(arrays(kan), x, oracle.silu).argmax(axis=1)
    torch.save(kan.state_dict(), tmp_path / "m.pt")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "labels.npy", labels)
    files = ["--samples", str(tmp_path / "x.npy"), "--targets", str(tmp_path / "labels.npy")]
    command = [
        "inspect",
        str(tmp_path / "m.pt"),
        "--activation",
        "silu",
        "--sparsity",
        *files,
    ]
    done = run_export(*command)
    assert done.returncode == 0, done.stderr
    table = done.stdout.partition("What leaving edges out would change")[2]
    assert max(map(len, table.splitlines())) <= 80
    assert "checkpoint, on 60 rows of the samples: accuracy 100 %" in done.stdout
    found = json.loads(run_export(*command, "--json").stdout)
    assert found["targets"][0]["scores"][0]["accuracy"] == 1
    for step in found["sparsity"]:
        expected = pruned(kan, step["threshold"], x, torch.from_numpy(x)).argmax(axis=1) == labels
        assert step["targets"][0]["scores"][0]["accuracy"] == pytest.approx(expected.mean())
    assert found["sparsity"][-1]["targets"][0]["scores"][0]["accuracy"] < 1


class OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kan = uneven([4, 1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kan(x).squeeze(-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "targets", "message"),
    [
        (
            uneven([4, 3]),
            np.full(20, 3),
            r"labels from 0 to 2, .* found 3 in row 0; count .* from 0",
        ),
        (uneven([4, 3]), np.full(20, -1), "found -1 in row 0"),
        (uneven([4, 3]), np.zeros(20), "if these are class labels, save them as y.astype"),
        (uneven([4, 3]), np.zeros((20, 3), int), r"expected whole numbers of shape \[batch\]"),
        (uneven([4, 3]), np.zeros((20, 2)), r"or floats of shape \[batch, 3\]"),
        (uneven([4, 3]), np.zeros(21, int), "expected 20 rows"),
        (uneven([4, 3]), np.full((20, 3), np.nan), "NaN or infinity in 20 of 20 rows, row 0"),
        (OneNumber(), np.zeros(20, int), r"floats of shape \[batch\], .* as floats: y.astype"),
        (uneven([4, 1]), np.zeros(20, int), r"floats of shape \[batch, 1\]"),
        (uneven([4, 3]), {"scores": np.zeros(20, int)}, "found scores; write NAME=FILE"),
        (uneven([4, 3]), np.array(["a"] * 20), "found <U1"),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    tmp_path: Path, module: nn.Module, targets: Any, message: str
) -> None:
    x = within(uneven([4, 3]), 20)
    with pytest.raises(InputError, match=f"--targets.*{message}"):
        export_module(module, name="m", output=tmp_path, samples=x, targets=targets)
    assert list(tmp_path.iterdir()) == []


def test_one_number_a_row_is_scored_in_either_shape() -> None:
    module, x = OneNumber(), within(uneven([4, 3]), 20)
    y = oracle.kan(arrays(module.kan), x, oracle.silu)
    for targets in (y, y[:, 0]):
        (score,) = scored(module, x, targets)[0].scores
        assert score.rmse == pytest.approx(0, abs=1e-6)
