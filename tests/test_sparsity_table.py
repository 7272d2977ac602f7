"""What leaving edges out would change, as the terminal tells it before an export and after."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export import tables
from export.inputs import read_inputs
from export.network import describe_network
from export.sparsity import THRESHOLDS, prune_further, prune_network
from kan_model.inspection import inspect_checkpoint
from tests import oracle
from tests.conftest import GOLDENS, run_export
from tests.edges import WithKAN, arrays, pruned, uneven, within, zeroed

UNIFORM = GOLDENS / "uniform_4x8x3.pt"


def test_the_table_is_what_an_export_would_find() -> None:
    kan = uneven([5, 7, 3])
    found = list(prune_further(describe_network(uneven([5, 7, 3]), None), THRESHOLDS))
    assert [step.threshold for step in found] == list(THRESHOLDS)
    x = within(kan, 200)
    for step in found:
        state = zeroed(kan, step.threshold)
        assert step.zeroed == sum(
            int((state[f"layers.{i}.base_weight"] == 0).sum()) for i in range(2)
        )
        alone = prune_network(describe_network(uneven([5, 7, 3]), None), step.threshold)[2]
        assert alone.change == step.change
        assert step.change is not None
        assert step.change.on == "grid"
    changes = [step.change.largest for step in found if step.change is not None]
    assert changes == sorted(changes)
    assert changes[0] == 0
    off = np.abs(pruned(kan, THRESHOLDS[-1], x) - oracle.kan(arrays(kan), x, oracle.silu))
    assert off.max() == pytest.approx(changes[-1], rel=0.5)  # on other random rows


def test_inspect_shows_it_on_stdout(tmp_path: Path) -> None:
    torch.save(uneven([5, 7, 3]).state_dict(), tmp_path / "m.pt")
    flags = ["--activation", "silu", "--sparsity"]
    done = run_export("inspect", tmp_path / "m.pt", *flags)
    assert done.returncode == 0, done.stderr
    assert "What leaving edges out would change" in done.stdout
    table = done.stdout.partition("What leaving edges out would change")[2]
    assert max(map(len, table.splitlines())) <= 80
    as_json = run_export("inspect", tmp_path / "m.pt", *flags, "--json")
    steps = json.loads(as_json.stdout)["sparsity"]
    assert [step["threshold"] for step in steps] == list(THRESHOLDS)
    for step in steps:
        assert f" {sum(layer['zeroed'] for layer in step['layers'])} " in done.stdout


def test_why_no_node_is_taken_out_is_told() -> None:
    """Of a KAN with an idle input, which stays, and of one in a network, whose idle node does."""
    kan, network = uneven([5, 7, 3]), WithKAN().eval()
    with torch.no_grad():
        for layer in (kan.layers[0], network.head.layers[1]):
            layer.base_weight[:, 2] = 0
            layer.spline_weight[:, 2] = 0
    _, _, stays = prune_network(describe_network(kan, None), 0.0)
    assert stays.nodes_removed == (0, 0, 0)
    told = "\n".join(tables.pruning_lines(stays))
    assert "7 of 56 edges left out" in told
    assert "no hidden one is idle, and at most half of the inputs are" in told
    inputs = read_inputs("3", None)
    _, _, inside = prune_network(describe_network(network, inputs), 0.0)
    told = "\n".join(tables.pruning_lines(inside))
    assert "2 of 36 edges left out" in told
    assert "no node is taken out, because that is done in a KAN alone" in told


def test_nodes_are_told_of_only_where_they_can_go(tmp_path: Path) -> None:
    found = inspect_checkpoint(UNIFORM)
    for network, can_go in (
        (describe_network(uneven([5, 7, 3]), None), True),
        (describe_network(WithKAN().eval(), read_inputs("3", None)), False),
    ):
        text = tables.inspection(found, list(prune_further(network, THRESHOLDS)))
        assert ("nodes that are then idle go too" in text) == can_go
        assert ("nothing smaller or faster" in text) != can_go
        table = text.partition("What leaving edges out would change")[2]
        assert max(map(len, table.splitlines())) <= 80


def test_inspect_takes_a_network_of_your_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(WithKAN().state_dict(), tmp_path / "m.pt")
    rows = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    rows[4, 1] = np.nan
    np.save(tmp_path / "x.npy", rows)
    for data, on in (
        (["--input-shape", "3"], "random"),
        (["--samples", str(tmp_path / "x.npy")], "samples"),
    ):
        flags = ["--model", "tests.edges:WithKAN", *data, "--json"]
        done = run_export("inspect", tmp_path / "m.pt", "--sparsity", *flags)
        assert done.returncode == 0, done.stderr
        step = json.loads(done.stdout)["sparsity"][-1]
        assert [layer["name"] for layer in step["layers"]] == ["head.layers.0", "head.layers.1"]
        assert step["change"]["on"] == on
        assert ("1 of 20 rows hold NaN" in done.stderr) == (on == "samples")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["inspect", "m.pt", "--prune", "0.1"], "inspect exports nothing; leave out --prune"),
        (["inspect", "m.pt", "--prune", "0"], "inspect exports nothing; leave out --prune"),
        (["inspect", "m.pt", "--output", "models"], "inspect exports nothing; leave out --output"),
        (["inspect", "m.pt", "--samples", "x.npy"], "leave out --samples, or add --sparsity"),
        (["m.pt", "--sparsity"], "--sparsity belongs to inspect"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: list[str], message: str) -> None:
    done = run_export(*flags)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_rows_of_samples_are_told_from_made_ones() -> None:
    inputs = read_inputs(None, within(uneven([5, 7, 3]), 30))
    steps = list(prune_further(describe_network(uneven([5, 7, 3]), inputs), [0.1]))
    assert steps[0].change is not None
    assert (steps[0].change.on, steps[0].change.rows) == ("samples", 30)
