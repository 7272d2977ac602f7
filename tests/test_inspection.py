import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kan_model import CheckpointError, inspect_checkpoint
from tests import zoo
from tests.conftest import GOLDENS, ROOT, Golden, run_export
from tests.states import good, saved, with_value


def test_it_tells_what_the_goldens_are(golden: Golden) -> None:
    found = inspect_checkpoint(golden.checkpoint)
    (kan,) = found.kans
    assert found.refused is None
    assert (kan.kind, kan.prefix, kan.faults) == ("KAN", "", ())
    widths = list(zip(golden.widths, golden.widths[1:], strict=False))
    assert [(layer.in_features, layer.out_features) for layer in kan.layers] == widths
    assert {(layer.grid_size, layer.spline_order) for layer in kan.layers} == {
        (golden.grid_size, golden.order)
    }
    adapted = golden.name.startswith("adapted")
    assert {layer.grid for layer in kan.layers} == {"adapted" if adapted else "uniform"}
    grid = torch.load(golden.checkpoint)["layers.0.grid"][:, golden.order : -golden.order]
    assert kan.layers[0].grid_range == (float(grid.min()), float(grid.max()))
    # Base weight, scaler and G + k coefficients on every edge.
    edges = sum(a * b for a, b in widths)
    assert kan.parameters == edges * (2 + golden.grid_size + golden.order)
    assert [what.partition(":")[0] for what in kan.unknown] == [
        "the base activation",
        "how inputs were scaled and shaped before they reached it",
    ]


def test_a_pickled_modules_activation_is_told() -> None:
    (kan,) = inspect_checkpoint(GOLDENS / "pickled_module_4x6x2.pt").kans
    assert {layer.base_activation for layer in kan.layers} == {"silu"}
    assert len(kan.unknown) == 1
    assert kan.doubts == ()


def test_what_is_wrong_is_collected_and_the_rest_still_told(tmp_path: Path) -> None:
    state = with_value(good(), "layers.1.grid", (2, 4), float("nan"))
    found = inspect_checkpoint(saved(tmp_path, state))
    (kan,) = found.kans
    assert [(layer.in_features, layer.out_features) for layer in kan.layers] == [(2, 3), (3, 1)]
    assert any("layers.1.grid: 1 of 36 values are not finite" in fault for fault in kan.faults)
    assert found.refused == kan.faults[0]


def test_what_is_doubtful_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([2, 3, 1]).double()
    grid = network.layers[0].grid
    assert isinstance(grid, torch.Tensor)
    grid[1, 5] = grid[1, 4] + 1e-5
    nn.init.zeros_(network.layers[1].spline_weight)
    (kan,) = inspect_checkpoint(saved(tmp_path, network.state_dict())).kans
    told = " ".join(kan.doubts)
    assert "layers.0.grid: the knots of feature 1 are" in told
    assert "layers.1.spline_weight: is zero everywhere" in told
    assert "is torch.float64; the exported files are float32" in told


def test_every_kan_of_a_file_is_told_and_what_else_there_is(tmp_path: Path) -> None:
    content = {
        "student": zoo.KAN([2, 1]).state_dict(),
        "teacher": zoo.KAN([2, 9, 1]).state_dict() | {"extra": torch.zeros(1)},
    }
    found = inspect_checkpoint(saved(tmp_path, content))
    assert [kan.prefix for kan in found.kans] == ["student.", "teacher."]
    assert found.other_tensors == ("teacher.extra",)
    assert found.refused is not None
    assert "holds 2 KANs" in found.refused
    assert inspect_checkpoint(tmp_path / "model.pt", prefix="student").refused is None


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        inspect_checkpoint(tmp_path / "none.pt")


def test_the_command_prints_what_is_in_the_file_and_exports_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": good()})
    done = run_export("inspect", path)
    assert (done.returncode, done.stderr) == (0, "")
    for expected in (
        "KAN with prefix 'state_dict.'",
        "state_dict.layers.0",
        "uniform",
        "-1 to 1",
        "not in the file",
        "export takes it",
    ):
        assert expected in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_the_command_prints_json_and_says_by_its_code_what_an_export_would_do(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path, good() | {"classifier.weight": torch.zeros(2, 2)})
    done = run_export(path, "--inspect", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert found["other_tensors"] == ["classifier.weight"]
    assert "unexpected tensors: classifier.weight" in found["refused"]
    assert found["kans"][0]["layers"][0]["parameters"] == 2 * 3 * 10


@pytest.mark.parametrize("name", ["model[red].pt", "[b]model.pt"])
def test_names_with_markup_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    torch.save(good() | {"x\x1b[2J": torch.zeros(1)}, tmp_path / name)
    done = run_export("inspect", tmp_path / name)
    assert done.returncode == 1
    assert name in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_tensors_that_cannot_be_worked_with_are_faults_not_failures(tmp_path: Path) -> None:
    sparse = good() | {"layers.0.base_weight": good()["layers.0.base_weight"].to_sparse()}
    huge = good() | {"layers.0.base_weight": torch.zeros(1).expand(3 * 10**9, 2)}
    for state, message in ((sparse, "found a sparse one"), (huge, "is 24000000000 bytes")):
        found = inspect_checkpoint(saved(tmp_path, state))
        assert found.refused is not None
        assert message in found.refused
        assert message in found.kans[0].faults[0]


def test_inspection_prints_json_that_is_json(tmp_path: Path) -> None:
    path = saved(tmp_path, with_value(good(), "layers.1.grid", (2, 4), float("nan")))
    done = run_export("inspect", path, "--json")
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found["kans"][0]["layers"][1]["grid_range"] is None


def test_the_activation_may_be_named_and_export_only_flags_may_not(tmp_path: Path) -> None:
    path = saved(tmp_path, zoo.KAN([2, 1], base_activation=nn.PReLU).state_dict())
    assert run_export("inspect", path).returncode == 1
    named = run_export("inspect", path, "--activation", "torch.nn:PReLU")
    assert named.returncode == 0, named.stdout
    wrong = run_export("inspect", path, "--model", "a:b")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "leave out --model" in wrong.stderr


def test_it_starts_without_the_compiler_of_torch_and_collects_garbage_again() -> None:
    """Which takes as long to import as torch itself."""
    script = (
        "import gc, sys; from export.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(code or not gc.isenabled() or 'torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "inspect", str(GOLDENS / "uniform_4x8x3.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
