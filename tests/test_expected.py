"""Answers that a network is known to give: right ones pass, others are refused with their cause."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import ExpectationError, InputError, export_checkpoint, export_module
from export.answers import read_answers
from export.expected import ChosenActivation, compare_expected
from export.inputs import read_inputs
from export.network import describe_network
from export.report import Report
from kan_bundle.manifest import read_manifest
from kan_bundle.scores import ExpectedRecord
from kan_model import KAN
from tests import oracle
from tests.conftest import GOLDENS, Golden, run_export
from tests.edges import arrays, uneven, within

GELU = GOLDENS / "gelu_4x6x2.pt"
UNIFORM = GOLDENS / "uniform_4x8x3.pt"


def compared(
    module: nn.Module, x: Any, expected: Any, chosen: ChosenActivation | None = None
) -> ExpectedRecord:
    inputs = read_inputs(None, x)
    answers = read_answers(expected, None, inputs)
    assert answers is not None
    return compare_expected(describe_network(module.eval(), inputs), answers, chosen)


def answered(module: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = module.eval()(torch.from_numpy(x)).numpy()
    return found


def test_right_answers_pass_and_confirm_the_activation(tmp_path: Path) -> None:
    """Upstream's own answers, in float64, with the assumed activation."""
    golden = Golden("uniform_4x8x3", [4, 8, 3])
    finite = np.isfinite(golden.y64).all(axis=1)
    np.save(tmp_path / "x.npy", golden.x[finite])
    np.save(tmp_path / "y.npy", golden.y64[finite])
    files = ["--samples", str(tmp_path / "x.npy"), "--expected", str(tmp_path / "y.npy")]
    done = run_export(UNIFORM, "--output", tmp_path / "models", *files)
    assert done.returncode == 0, done.stderr
    assert "ASSUMED" not in done.stderr
    assert "warning" not in done.stderr
    assert f"answers as expected on {finite.sum()} rows, off by at most" in done.stderr
    folder = tmp_path / "models" / "uniform_4x8x3" / "1"
    manifest = read_manifest(folder)
    assert manifest.expected is not None
    assert (manifest.expected.outputs, manifest.expected.rows) == (("output",), finite.sum())
    assert not manifest.activation_assumed
    page = (folder / "report.html").read_text()
    assert f"answers as expected on {finite.sum()} rows" in page
    assert "ASSUMED" not in page


def test_an_assumed_activation_is_told_from_a_known_one(tmp_path: Path, quiet: Report) -> None:
    done = export_checkpoint(UNIFORM, output=tmp_path, report=quiet)
    assert done.activation_assumed
    folder = tmp_path / "uniform_4x8x3"
    assert read_manifest(folder / "1").activation_assumed
    assert "silu, assumed" in (folder / "1" / "report.html").read_text()
    done = export_checkpoint(UNIFORM, output=tmp_path, activation="silu", report=quiet)
    assert not done.activation_assumed
    assert "silu, assumed" not in (folder / "2" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "how"),
    [([], "silu was ASSUMED"), (["--activation", "tanh"], "tanh was given with --activation")],
)
def test_a_wrong_activation_is_refused_and_the_right_one_named(
    tmp_path: Path, flags: list[str], how: str
) -> None:
    golden = Golden("gelu_4x6x2", [4, 6, 2], activation="gelu")
    finite = np.isfinite(golden.y64).all(axis=1)
    np.save(tmp_path / "x.npy", golden.x[finite])
    np.save(tmp_path / "y.npy", golden.y64[finite].astype(np.float32))
    files = ["--samples", str(tmp_path / "x.npy"), "--expected", str(tmp_path / "y.npy")]
    done = run_export(GELU, "--output", tmp_path / "models", *files, *flags, "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    message = done.stderr.replace("\n", " ")
    assert message.startswith("error: --expected: output[")
    assert f"The base activation {how}, and with --activation gelu all answers" in message
    assert "of the samples: expected " in message
    assert not (tmp_path / "models").exists()


def test_the_named_row_and_numbers_are_those_of_the_definition() -> None:
    kan = uneven([4, 6, 2])
    x = within(kan, 100)
    expected = oracle.kan(arrays(kan), x, oracle.silu)
    assert compared(kan, x, expected).largest < 1e-12
    expected[37, 1] += 0.5
    with pytest.raises(ExpectationError) as refused:
        compared(kan, x, expected)
    told = str(refused.value)
    assert "output[1] in row 37 of the samples" in told
    assert f"expected {expected[37, 1]:.7g}, found {expected[37, 1] - 0.5:.7g}" in told
    assert "1 of 100 rows are not as expected" in told


def test_float32_answers_of_another_batch_size_are_equal() -> None:
    kan = uneven([4, 30, 2])
    x = within(kan, 200)
    with torch.no_grad():
        one_by_one = np.concatenate([answered(kan, row[None]) for row in x])
    found = compared(kan, x, one_by_one)
    assert 0 < found.largest < 1e-4 * found.size


class Cancelling(nn.Module):
    """Its answers are differences, a ten-thousandth of what they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = uneven([4, 6, 2])

    def forward(self, x: Tensor) -> Tensor:
        large = 1e3 + self.kan(x)
        return large - 1e3 - self.kan(x) * (1 - 1e-3)  # type: ignore[no-any-return]


def test_what_is_noisy_in_float32_may_be_as_noisy_as_it_is() -> None:
    torch.manual_seed(0)
    module = Cancelling()
    x = within(module.kan, 100)
    single = answered(module, x)
    exact = 1e-3 * oracle.kan(arrays(module.kan), x, oracle.silu)
    assert np.abs(single - exact).max() > 1e-3 * np.abs(exact).max()  # beyond the rule,
    found = compared(module, x, single)  # and passed for what float32 is off here
    assert found.largest == pytest.approx(np.abs(single - exact).max(), rel=1e-2)
    with pytest.raises(ExpectationError):
        compared(module, x, single + 0.1)


def test_an_output_that_is_always_zero_is_equal_to_zero() -> None:
    module = nn.Sequential(uneven([4, 2]), nn.Threshold(1e9, 0.0))
    x = within(uneven([4, 2]), 20)
    assert compared(module, x, np.zeros((20, 2))).largest == 0
    with pytest.raises(ExpectationError):
        compared(module, x, np.full((20, 2), 1e-9))


def test_nan_is_expected_as_nan() -> None:
    kan = uneven([4, 6, 2])
    x = within(kan, 30)
    x[7, 2] = np.nan
    expected = answered(kan, x)
    assert np.isnan(expected[7]).all()
    assert compared(kan, x, expected).rows == 30
    for wrong in (0.0, np.inf):
        changed = expected.copy()
        changed[7, 0] = wrong
        with pytest.raises(ExpectationError, match=r"output\[0\] in row 7 .* found nan"):
            compared(kan, x, changed)
    expected[3] = np.nan
    with pytest.raises(ExpectationError, match="in row 3 of the samples: expected nan"):
        compared(kan, x, expected)


def test_another_checkpoint_and_missing_normalisation_name_the_usual_causes() -> None:
    kan, x = uneven([4, 6, 2]), within(uneven([4, 6, 2]), 50)
    wrong = [answered(uneven([4, 6, 2], seed=1), x), answered(kan, (x - 0.3) / 0.2)]
    for expected in wrong:
        with pytest.raises(ExpectationError) as refused:
            compared(kan, x, expected, ChosenActivation("silu", assumed=True))
        assert "none of gelu, relu, tanh, identity gives the expected answers" in str(refused.value)
        assert "normalised" in str(refused.value)
        assert "another checkpoint" in str(refused.value)
    with pytest.raises(ExpectationError, match="computed with fewer bits"):
        compared(kan, x, answered(kan, x).astype(np.float16) * 1.002)


def test_trying_activations_leaves_the_network_as_it_was() -> None:
    kan, x = KAN([4, 5, 2]), within(KAN([4, 5, 2]), 30)
    before = [layer.base_activation for layer in kan.layers]
    with pytest.raises(ExpectationError):
        compared(kan, x, answered(kan, x) + 1, ChosenActivation("silu", assumed=True))
    assert all(layer.base_activation is b for layer, b in zip(kan.layers, before, strict=True))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = uneven([4, 3]), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"logits": y, "value": self.head(y).squeeze(-1)}


def test_several_outputs_are_compared_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TwoHeads().eval()
    x = within(module.body, 20)
    with torch.no_grad():
        y = {name: value.numpy() for name, value in module(torch.from_numpy(x)).items()}
    np.savez(tmp_path / "y.npz", **y)
    np.save(tmp_path / "value.npy", y["value"])
    assert compared(module, x, str(tmp_path / "y.npz")).outputs == ("logits", "value")
    assert compared(module, x, [f"value={tmp_path / 'value.npy'}"]).outputs == ("value",)
    assert compared(module, x, {"value": y["value"][:, None]}).rows == 20
    y["value"][4] += 1
    with pytest.raises(ExpectationError, match="--expected: value in row 4 of the samples"):
        compared(module, x, y)
    for wrong, message in (
        (y["value"], "expected arrays for logits, value, .*one without a name"),
        ({"values": y["value"]}, "found values; write NAME=FILE"),
        ({"logits": y["value"]}, r"--expected logits: expected floats of shape \[batch, 3\]"),
    ):
        with pytest.raises(InputError, match=message):
            compared(module, x, wrong)


class Pixels(nn.Module):
    """Whole numbers in, cast inside, so that float64 has no way in."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = uneven([4, 2])

    def forward(self, x: Tensor) -> Tensor:
        return self.kan(x.float() / 255)  # type: ignore[no-any-return]


def test_a_network_that_runs_in_float32_alone_is_compared_in_it() -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 4)).astype(np.uint8)
    module = Pixels()
    assert compared(module, x, answered(module, x)).largest < 1e-6
    with pytest.raises(ExpectationError):
        compared(module, x, answered(module, x) + 0.1)


def test_a_module_in_memory_takes_arrays(tmp_path: Path, quiet: Report) -> None:
    kan = uneven([4, 6, 2])
    x = within(kan, 20)
    y = answered(kan, x)
    with pytest.raises(ExpectationError):
        export_module(
            kan, name="m", output=tmp_path, samples=x, expected=y * 1.01, report=quiet, prune=0.1
        )
    assert list(tmp_path.iterdir()) == []
    done = export_module(
        kan, name="m", output=tmp_path, samples=x, expected={"output": y}, report=quiet
    )
    assert done.expected is not None
    assert (
        json.loads((tmp_path / "m" / "1" / "manifest.json").read_text())["expected"]["rows"] == 20
    )


# What is refused before anything is run.


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (np.zeros((19, 2)), r"--expected: expected 20 rows, as the samples have, .*\(19, 2\)"),
        (np.zeros((20, 3)), r"expected floats of shape \[batch, 2\].*found float64 .*\(20, 3\)"),
        (np.zeros((20, 2), int), "found int64 .*; give what the network answers, or class labels"),
        (np.zeros(20, int), "or class labels and targets with --targets"),
        (np.float32(1.0), r"array of shape \(\)"),
        ([1.0, 2.0], "found a list with a float"),
        ("none.npy", "--expected 'none.npy': cannot be read"),
        (torch.zeros(20, 2, requires_grad=True), "tensor.detach"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, expected: Any, message: str) -> None:
    kan = uneven([4, 6, 2])
    with pytest.raises(InputError, match=message):
        export_module(kan, name="m", output=tmp_path, samples=within(kan, 20), expected=expected)
    assert list(tmp_path.iterdir()) == []


def test_expected_answers_are_about_samples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows of --samples, and there are none"):
        export_module(uneven([4, 2]), name="m", output=tmp_path, expected=np.zeros((2, 2)))
    done = run_export(UNIFORM, "--expected", "y.npy")
    assert done.returncode == 2
    assert "--expected: is about the rows of --samples; give both" in done.stderr
    done = run_export("inspect", UNIFORM, "--expected", "y.npy")
    assert done.returncode == 2
    assert "inspect exports nothing; leave out --expected" in done.stderr
