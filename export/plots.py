"""Curves as figures, for a paper or a slide: `python -m export plot`, and the same in Python.

    from export.plots import plot_edge, plot_layer, plot_network, read_curves

    curves = read_curves("models/digits/1")              # a bundle, or a checkpoint of a KAN
    plot_edge(curves.layers[0], 3, 5).savefig("edge.svg")
    plot_layer(curves.layers[0], most=12).savefig("layer.pdf")
    plot_network(curves.layers).savefig("network.png", dpi=200)

Each returns a matplotlib Figure that is not shown anywhere. What is drawn of a bundle is what its
report holds: all edges, or of a large layer the most important ones; of a checkpoint everything, or
only what is asked for, as all edges of a large layer take gigabytes. matplotlib is imported when
something is drawn, not before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from export.building import note_activation
from export.curves import LayerCurves, importance, layer_curves
from export.errors import InputError
from export.report import Report
from export.report_page.diagram import BOX, WIDTH, make_diagram
from export.report_page.embedding import read_embedded, share_room
from kan_bundle.layout import REPORT_FILE
from kan_model import KANLinear, resolve_activation
from kan_model.checkpoint import read_checkpoint
from kan_model.errors import CheckpointError
from kan_model.stacks import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY, _PALE = "#0072B2", "#B87700", "#57606A", "#EEF0F2"  # those of the report
_LARGEST = 64 * 2**20  # bytes of a report


@dataclass(frozen=True)
class Curves:
    """The layers of a model.

    Attributes:
        layers: In the network's order.
        chain: Whether each one's outputs are the next one's inputs.
    """

    layers: tuple[LayerCurves, ...]
    chain: bool


@dataclass(frozen=True)
class Edges:
    """What a picture needs of a model's edges. A bundle has what its report holds of them.

    Attributes:
        layer: Those of this layer alone, by its number from 0; None are those of the whole network,
            of a large layer as many as a report holds.
        feature: Those from this input.
        output: Those to this output.
        most: So many of the layer at most, the most important ones.
    """

    layer: int | None = None
    feature: int | None = None
    output: int | None = None
    most: int = 24


def read_curves(
    path: Path | str,
    *,
    activation: str | None = None,
    prefix: str | None = None,
    only: Edges | None = None,
    report: Report | None = None,
) -> Curves:
    """Read the curves of a bundle or of a checkpoint.

    Args:
        path: A version folder or its report.html, or a checkpoint file with a KAN in it.
        activation: Base activation of a checkpoint, as `--activation`; None takes the file's own,
            or assumes SiLU and warns.
        prefix: The KAN to take of a checkpoint that holds several.
        only: Read these; None reads all.
        report: Is told the warnings; None makes Python's own of them.

    Raises:
        InputError: The bundle has no report with curves in it that can be read, or was given what
            only a checkpoint leaves open.
        CheckpointError: The checkpoint cannot be used.
        ActivationError: The activation cannot be had.
    """
    place = Path(path)
    if place.is_dir():
        place = place / REPORT_FILE
        if not place.exists():
            raise InputError(
                f"{place}: not there; give a version folder, MODELS/NAME/VERSION, whose export "
                "wrote a report, or the checkpoint itself"
            )
    if place.suffix == ".html":
        given = {"--activation": activation, "--prefix": prefix}
        if strays := [flag for flag, value in given.items() if value is not None]:
            raise InputError(
                f"{place}: a bundle says itself what it is; leave out {', '.join(strays)}"
            )
        try:
            with place.open("rb") as file:
                content = file.read(_LARGEST)
        except OSError as error:
            raise InputError(f"{place}: cannot be read: {error.strerror}") from error
        try:
            layers, chain = read_embedded(content)
        except ValueError as error:
            raise InputError(f"{place}: {error}") from error
        return Curves(tuple(layers[i] for i in _numbers(len(layers), only)), chain)
    checkpoint = read_checkpoint(place)
    make = None if activation is None else resolve_activation(activation)
    try:
        stack = checkpoint.find_kan(prefix)
    except CheckpointError as error:  # which speaks of the export's flags
        raise CheckpointError(
            f"{error}; plot itself takes --prefix alone: with another flag, export the network and "
            "plot its bundle"
        ) from error
    kan = checkpoint.build_kan(stack, make)
    report = report or Report.silent()
    note_activation(stack, activation, report)
    report.warn_if_assumed()
    rooms = [room.edges for room in share_room(list(kan.layers))]
    return Curves(
        tuple(
            _measure(f"layers.{i}", kan.layers[i], only, rooms[i])
            for i in _numbers(len(kan.layers), only)
        ),
        chain=True,
    )


def _numbers(count: int, only: Edges | None) -> Sequence[int]:
    """List the layers to read.

    Raises:
        InputError: There is no such layer.
    """
    if only is None or only.layer is None or not count:
        return range(count)
    if not 0 <= only.layer < count:
        raise InputError(f"--layer: expected 0 to {count - 1}, found {only.layer}")
    return [only.layer]


def _measure(name: str, layer: KANLinear, only: Edges | None, room: int) -> LayerCurves:
    """Measure a layer, and take the edges that are asked for."""
    measured = importance(layer)
    if only is None:
        return layer_curves(name, layer, measured, sampled=False)
    most = room if only.layer is None else only.most
    wanted = torch.zeros_like(measured, dtype=torch.bool)
    wanted[_part(only.output), _part(only.feature)] = True
    count = int(wanted.sum())
    ranked = measured
    if 0 < count < wanted.numel():  # what is not there is refused when it is drawn
        ranked = measured.nan_to_num(nan=0.0).where(wanted, -1)  # NaN would come last of all
        most = min(most, count)
    curves = layer_curves(name, layer, ranked, sampled=False, most_edges=most)
    return replace(curves, importance=measured.cpu().numpy().ravel()[curves.edges])


def _part(number: int | None) -> slice:
    return slice(None) if number is None else slice(number, number + 1)


def plot_edge(layer: LayerCurves, feature: int, output: int) -> "Figure":
    """Plot one edge: base, spline and their sum, with the knots and the margins of the grid.

    Args:
        layer: From `read_curves`.
        feature: Number of the input, from 0.
        output: Number of the output, from 0.

    Raises:
        InputError: There is no such edge, or the report does not hold it.
    """
    figure = _figure((5.0, 3.2))
    axes = figure.add_subplot()
    place = _find(layer, feature, output)
    _draw_edge(axes, layer, place)
    axes.set_title(
        f"{_name(layer)}: input {feature} to output {output}, "
        f"importance {layer.importance[place]:.3g}",
        fontsize=10,
    )
    axes.set_xlabel(f"input {feature}")
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_layer(
    layer: LayerCurves,
    *,
    feature: int | None = None,
    output: int | None = None,
    most: int = 24,
    same_height: bool = True,
) -> "Figure":
    """Plot a layer's edges side by side, the most important first.

    Args:
        layer: From `read_curves`.
        feature: Only those from this input.
        output: Only those to this output.
        most: So many at most.
        same_height: Whether all have one vertical axis, so that they can be compared.

    Raises:
        InputError: There are none.
    """
    outputs, features = np.divmod(layer.edges, layer.in_features)
    wanted = np.ones(len(layer.edges), dtype=bool)
    if feature is not None:
        wanted &= features == feature
    if output is not None:
        wanted &= outputs == output
    places = np.flatnonzero(wanted)[:most].tolist()
    if not places:
        raise InputError(_no_such(layer, feature, output))
    columns = min(6, math.ceil(math.sqrt(len(places))))
    rows = math.ceil(len(places) / columns)
    figure = _figure((2.1 * columns + 0.3, 1.6 * rows + 0.5))
    grid: Any = figure.subplots(rows, columns, sharey=same_height, squeeze=False)
    for axes, place in zip(grid.flat, places, strict=False):
        _draw_edge(axes, layer, place)
        start, end = layer.ends(place)
        axes.set_title(f"{start} \N{RIGHTWARDS ARROW} {end}", fontsize=8, loc="left")
        axes.set_title(f"{layer.importance[place]:.3g}", fontsize=7, loc="right", color=_GREY)
        axes.tick_params(labelsize=6)
    for axes in grid.flat[len(places) :]:
        axes.set_axis_off()
    all_edges = layer.in_features * layer.out_features
    figure.suptitle(f"{_name(layer)}: {len(places)} of {all_edges:,} edges", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def plot_network(layers: Sequence[LayerCurves]) -> "Figure":
    """Plot the diagram of a stack of layers, or of one, wide layers thinned to what counts most.

    Args:
        layers: From the first to the last; each one's outputs are the next one's inputs.
    """
    diagram = make_diagram(layers)
    scale = 9.0 / WIDTH
    figure = _figure((9.0, diagram.height * scale), layout=None)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(diagram.height, 0)
    axes.set_axis_off()
    from matplotlib.patches import Rectangle

    for edge in diagram.edges:
        style = {"color": "black", "linewidth": 1.0, "alpha": edge.opacity, "zorder": 1}
        (x, y), (width, height) = edge.frame, BOX
        axes.plot([edge.start[0], x], [edge.start[1], y + height / 2], **style)
        axes.plot([x, edge.stop[0]], [y - height / 2, edge.stop[1]], **style)
        corner = (x - width / 2, y - height / 2)
        axes.add_patch(
            Rectangle(
                corner, width, height, fill=False, linewidth=0.8, alpha=edge.opacity, zorder=2
            )
        )
        axes.plot(*edge.curve.T, color=_BLUE, linewidth=1.4, alpha=edge.opacity, zorder=3)
    below, above, beside = ("center", "top"), ("center", "bottom"), ("left", "center")
    places = {"input": (0, 10, below), "output": (0, -10, above), "hidden": (9, 0, beside)}
    for node in diagram.nodes:
        axes.plot(node.x, node.y, "o", color="black", markersize=5, zorder=4)
        across, down, (horizontal, vertical) = places[node.end]
        axes.text(
            node.x + across, node.y + down, node.label, fontsize=8, ha=horizontal, va=vertical
        )
    return figure


def _figure(
    size: tuple[float, float], layout: Literal["constrained"] | None = "constrained"
) -> "Figure":
    """Make a figure of its own, in inches, which no window and no global state know of.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "plots need matplotlib; install kanserve's extra plot: pip install '.[plot]' in its "
            "checkout"
        ) from error
    return Figure(figsize=size, layout=layout)


def _draw_edge(axes: Any, layer: LayerCurves, place: int) -> None:
    curve = layer.curve(place)
    feature = layer.ends(place)[0]
    knots = layer.knots_of(feature)
    low, high = knots[layer.order], knots[-1 - layer.order]
    for start, end in ((knots[0], low), (high, knots[-1])):
        axes.axvspan(start, end, color=_PALE, linewidth=0, zorder=0)
    axes.axhline(0, color=_GREY, linewidth=0.5, zorder=1)
    axes.plot(curve.x, curve.base, ":", color=_GREY, linewidth=1.2, label="base")
    axes.plot(curve.x, curve.spline, "--", color=_ORANGE, linewidth=1.2, label="spline")
    axes.plot(curve.x, curve.total, color=_BLUE, linewidth=1.6, label="sum")
    axes.plot(
        knots,
        np.zeros(len(knots)),
        "|",
        color=_GREY,
        markersize=5,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )
    axes.set_xlim(knots[0], knots[-1])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _name(layer: LayerCurves) -> str:
    return printable(layer.name).replace("$", "\\$")  # no formula of matplotlib's


def _find(layer: LayerCurves, feature: int, output: int) -> int:
    place = layer.place(feature, output)
    if place is None:
        raise InputError(_no_such(layer, feature, output))
    return place


def _no_such(layer: LayerCurves, feature: int | None, output: int | None) -> str:
    inside = (feature is None or 0 <= feature < layer.in_features) and (
        output is None or 0 <= output < layer.out_features
    )
    if inside:
        return (
            f"{printable(layer.name)}: the report holds the {len(layer.edges):,} most important "
            f"of {layer.in_features * layer.out_features:,} edges, and this is none of them; give "
            "the checkpoint instead of the bundle"
        )
    asked = [
        (kind, width, number)
        for kind, width, number in (
            ("input", layer.in_features, feature),
            ("output", layer.out_features, output),
        )
        if number is not None
    ]
    expected = " and ".join(f"an {kind} from 0 to {width - 1}" for kind, width, _ in asked)
    found = " and ".join(f"{kind} {number}" for kind, _, number in asked)
    return f"{printable(layer.name)}: expected {expected}, found {found}"
