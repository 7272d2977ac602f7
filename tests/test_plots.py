"""Curves as files: what is drawn, what is written, and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from export import plot_command
from export.curves import LayerCurves, layer_curves
from export.errors import InputError
from export.plots import Edges, plot_edge, plot_layer, plot_network, read_curves
from kan_model import KAN, CheckpointError
from tests import forkserver
from tests.conftest import GOLDENS, ROOT, STATE_DICTS, Golden, run_export
from tests.edges import WithKAN
from tests.layers import golden_layers, phi

UNIFORM = STATE_DICTS[0]
BEGINNINGS = {".png": b"\x89PNG", ".pdf": b"%PDF-", ".svg": b"<?xml"}


def drawn(figure: Figure, label: str) -> tuple[Any, Any]:
    """The points of the one line with this label in the first axes."""
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == label]
    x, y = line.get_data()
    return x, y


def test_an_edge_is_drawn_as_it_is_defined(repository: Path, golden: Golden) -> None:
    layers = golden_layers(golden)
    from_file = read_curves(golden.checkpoint, activation=golden.activation)
    for curves in (from_file, read_curves(repository / golden.name / "1")):
        figure = plot_edge(curves.layers[1], 2, 1)
        x, total = drawn(figure, "sum")
        _, spline = drawn(figure, "spline")
        exact = from_file.layers[1].curve(from_file.layers[1].place(2, 1) or 0).x
        expected = np.array([phi(layers[1], 2, 1, v, golden.activation) for v in exact[:-1]])
        size = np.abs(expected).max()
        np.testing.assert_allclose(x, exact, rtol=1e-6)
        np.testing.assert_allclose(spline[:-1], expected[:, 1], atol=2e-6 * size)
        np.testing.assert_allclose(total[:-1], expected.sum(axis=1), atol=2e-6 * size)


def test_a_layer_is_drawn_edge_by_edge_the_most_important_first(repository: Path) -> None:
    layer = read_curves(repository / UNIFORM.name / "1").layers[0]
    figure = plot_layer(layer, most=7)
    shown = [axes.get_title("left") for axes in figure.axes if axes.axison]
    ends = [layer.ends(place) for place in range(7)]
    assert shown == [f"{feature} \N{RIGHTWARDS ARROW} {output}" for feature, output in ends]
    heights = {axes.get_ylim() for axes in figure.axes if axes.axison}
    assert len(heights) == 1
    of_input = plot_layer(layer, feature=2)
    assert all(axes.get_title("left")[0] == "2" for axes in of_input.axes if axes.axison)
    assert sum(axes.axison for axes in of_input.axes) == 8
    assert len(plot_layer(layer, feature=2, output=3).axes) == 1


def test_the_diagram_has_every_node_and_edge_of_a_small_network() -> None:
    curves = read_curves(UNIFORM.checkpoint, activation="silu")
    figure = plot_network(curves.layers)
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert labels[:4] == ["0", "1", "2", "3"]
    assert labels[-3:] == ["0", "1", "2"]
    assert len(figure.axes[0].patches) == 16 + 16  # frames: of 32 and of 24 edges those shown


def test_an_activation_that_nobody_names_is_assumed_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="silu is ASSUMED"):
        read_curves(UNIFORM.checkpoint)
    read_curves(UNIFORM.checkpoint, activation="silu")
    read_curves(GOLDENS / "pickled_module_4x6x2.pt")  # which tells it
    done = run_export("plot", UNIFORM.checkpoint, "-o", tmp_path / "kan.svg")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/kan.svg\n")
    assert done.stderr.startswith("warning: the file does not say which base activation")


@pytest.mark.parametrize("ending", BEGINNINGS)
def test_the_command_writes_what_the_name_says(
    repository: Path, tmp_path: Path, ending: str
) -> None:
    file = tmp_path / f"kan{ending}"
    bundle = repository / UNIFORM.name / "1"
    for words in ([], ["--layer", "0"], ["--layer", "0", "--input", "1", "--output", "2"]):
        arguments = plot_command.parse([str(bundle), "-o", str(file), *words])
        assert plot_command.plot(arguments) == file
        assert file.read_bytes().startswith(BEGINNINGS[ending])
        first = file.read_bytes()
        plot_command.plot(arguments)
        assert file.read_bytes() == first  # nothing in it comes by chance or from the clock


def test_the_command_prints_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "kan.svg"
    done = run_export("plot", GOLDENS / "uniform_4x8x3.pt", "-o", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{file}\n"
    assert "<svg" in file.read_text()
    refused = run_export("plot", tmp_path / "none.pt", "-o", file)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "none.pt: no such file" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_picture_that_there_is_no_room_for_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    """With a limit for the size of files, which is met as a full disk is."""
    file = tmp_path / "kan.svg"
    file.write_text("before")
    limited = (
        "import resource, sys, matplotlib.font_manager; from export.__main__ import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); sys.exit(main())"
    )
    words = ["plot", GOLDENS / "uniform_4x8x3.pt", "--activation", "silu", "-o", file]
    done = subprocess.run(
        forkserver.command("-c", limited, *map(str, words)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {file}: File too large; make room, or choose another -o\n"
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_picture_goes_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    link = tmp_path / "kan.svg"
    link.symlink_to(tmp_path / "pictures" / "new.svg")
    words = [str(UNIFORM.checkpoint), "--activation", "silu", "-o", str(link)]
    plot_command.plot(plot_command.parse(words))
    assert link.is_symlink()
    assert "<svg" in (tmp_path / "pictures" / "new.svg").read_text()
    assert len(list((tmp_path / "pictures").iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "-o", "kan.gif"], "ends in .svg, .png, .pdf"),
        (["m"], "required: -o"),
        (["m", "-o", "a.svg", "--input", "1"], "give its --layer"),
        (["m", "-o", "a.svg", "--layer", "0", "--most", "0"], "at least 1"),
        (["m", "-o", "a.svg", "--layr", "0"], "did you mean --layer?"),
        (["m", "-o", "a.svg", "--most", "3"], "--most is that of a layer; give its --layer"),
        (
            ["m", "-o", "a.svg", "--layer=0", "--input=1", "--output=2", "--most=3"],
            "one edge; leave --most out",
        ),
    ],
)
def test_wrong_usage_is_told(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        plot_command.parse(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer", "2"], "expected 0 to 1, found 2"),
        (["--layer", "0", "--input", "4", "--output", "0"], "an input from 0 to 3"),
        (
            ["--layer", "0", "--input", "9"],
            r"^layers\.0: expected an input from 0 to 3, found input 9$",
        ),
        (["--layer", "0", "--output", "-1"], "expected an output from 0 to 7, found output -1$"),
        (["--activation", "gelu"], "leave out --activation$"),
        (["--activation", "silu", "--prefix", ""], "leave out --activation, --prefix$"),
    ],
)
def test_what_is_not_there_is_told(
    repository: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    bundle = str(repository / UNIFORM.name / "1")
    arguments = plot_command.parse([bundle, "-o", str(tmp_path / "a.svg"), *words])
    with pytest.raises(InputError, match=message):
        plot_command.plot(arguments)
    assert not (tmp_path / "a.svg").exists()


def test_what_has_no_curves_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.html: not there"):
        read_curves(tmp_path)
    page = tmp_path / "report.html"
    page.write_text("<p>of an older kanserve</p>")
    with pytest.raises(InputError, match="no curves in it"):
        read_curves(tmp_path)
    with pytest.raises(InputError, match=r"missing\.html: cannot be read: No such file"):
        read_curves(tmp_path / "missing.html")
    torch.save(WithKAN().state_dict(), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"export the network and plot its bundle$"):
        read_curves(tmp_path / "whole.pt")


def test_edges_that_a_report_has_no_room_for_come_from_the_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(KAN([3, 2]).state_dict(), tmp_path / "kan.pt")
    layer = read_curves(tmp_path / "kan.pt", activation="silu").layers[0]
    few = type(layer)(
        **{
            **vars(layer),
            **{
                name: vars(layer)[name][:2]
                for name in ("edges", "importance", "base_weight", "coefficients")
            },
        }
    )
    feature, output = layer.ends(5)
    assert plot_edge(layer, feature, output).axes
    with pytest.raises(InputError, match="holds the 2 most important of 6 edges"):
        plot_edge(few, feature, output)


@pytest.mark.parametrize(
    ("feature", "output", "most"), [(None, None, 7), (2, None, 3), (None, 1, 24), (3, 2, 24)]
)
def test_of_a_checkpoint_only_the_edges_that_are_drawn_are_kept(
    feature: int | None, output: int | None, most: int
) -> None:
    """They are those that a layer with all of its edges would have drawn."""
    whole = read_curves(UNIFORM.checkpoint, activation="silu").layers[0]
    only = Edges(0, feature, output, most)
    (few,) = read_curves(UNIFORM.checkpoint, activation="silu", only=only).layers
    ends = np.array([whole.ends(place) for place in range(len(whole.edges))])
    wanted = np.ones(len(ends), dtype=bool)
    for side, number in enumerate((feature, output)):
        if number is not None:
            wanted &= ends[:, side] == number
    for name in ("edges", "importance", "base_weight", "coefficients"):
        expected = getattr(whole, name)[wanted][:most]
        np.testing.assert_array_equal(getattr(few, name), expected)


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)


def test_an_importance_that_is_no_number_is_told_as_none(tmp_path: Path) -> None:
    """Where the activation has no value for part of the grid."""
    torch.save(KAN([2, 1]).state_dict(), tmp_path / "kan.pt")
    for only in (None, Edges(0, 1, 0)):
        curves = read_curves(tmp_path / "kan.pt", activation=f"{__name__}:Root", only=only)
        assert np.isnan(curves.layers[0].importance).all()


def test_the_command_asks_for_no_more_than_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    torch.save(KAN([300, 200, 2]).state_dict(), tmp_path / "kan.pt")
    held: list[int] = []

    def look(*arguments: Any, **options: Any) -> LayerCurves:
        curves = layer_curves(*arguments, **options)
        held.append(len(curves.edges))
        return curves

    monkeypatch.setattr("export.plots.layer_curves", look)
    for words, edges in (([], [59_999, 400]), (["--layer", "0", "--input", "3"], [24])):
        held.clear()
        flags = ["--activation", "silu", "-o", str(tmp_path / "kan.svg"), *words]
        plot_command.plot(plot_command.parse([str(tmp_path / "kan.pt"), *flags]))
        assert len(held) == len(edges)
        assert all(found <= most for found, most in zip(held, edges, strict=True))


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    layer = read_curves(UNIFORM.checkpoint, activation="silu").layers[0]
    with pytest.raises(InputError, match=r"pip install '\.\[plot\]'"):
        plot_edge(layer, 0, 0)
