"""The diagram that KANs are known by: nodes in rows, the inputs below, each edge with its curve.

Wide layers are thinned to what counts most: from the outputs down, the edges through which most of
the variation comes, and the nodes at their ends. This module knows places in a plane, and no
drawing library.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.curves import Array, LayerCurves, attribution

WIDTH = 960.0
BOX = (46.0, 38.0)
"""Width and height of the frame around a curve."""

_MOST_NODES = 10  # in a row
_MOST_EDGES = 16  # between two rows
_ROW = 165.0  # from one row of nodes to the next
_MARGIN = 34.0  # above and below, for the numbers of the nodes
_FAINTEST = 0.15
_INSIDE = 4.0  # between a frame and its curve


@dataclass(frozen=True)
class Node:
    """A feature: an input of the network, or an output of a layer.

    Attributes:
        label: Its number, from 0.
        x: Place; y falls from the inputs to the outputs.
        y: Place.
        end: `input` or `output` of the whole, `hidden` between.
    """

    label: str
    x: float
    y: float
    end: str


@dataclass(frozen=True)
class Edge:
    """An edge with its curve.

    Attributes:
        title: What it is, in words.
        start: Place of its input.
        frame: Place of the middle of its curve.
        stop: Place of its output.
        opacity: Its importance as a share of the layer's largest, never invisible.
        curve: Its curve inside of the frame, shape (points, 2).
    """

    title: str
    start: tuple[float, float]
    frame: tuple[float, float]
    stop: tuple[float, float]
    opacity: float
    curve: Array


@dataclass(frozen=True)
class Diagram:
    """What is to be drawn, in a plane `WIDTH` wide whose y points down.

    Attributes:
        nodes: All of them.
        edges: All of them.
        height: Of the plane.
        notes: What was left out, a line for each row or layer of which not all is shown.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    height: float
    notes: tuple[str, ...]


def make_diagram(layers: Sequence[LayerCurves]) -> Diagram:
    """Place the nodes and edges of a stack of layers, or of one.

    Args:
        layers: From the first to the last; each one's outputs are the next one's inputs.
    """
    importances = [layer.matrix() for layer in layers]
    scores = attribution(importances)
    rows: list[list[int]] = [_strongest(importances[-1].sum(axis=1), _MOST_NODES)]
    chosen: list[list[int]] = []  # places in a layer's edges
    for layer, matrix, score in zip(
        reversed(layers), reversed(importances), reversed(scores[1:]), strict=True
    ):
        total = matrix.sum(axis=1)
        share = np.divide(score, total, out=np.zeros_like(total), where=total > 0)
        places = _choose_edges(layer, share, rows[-1])
        chosen.append(places)
        rows.append(sorted({layer.ends(place)[0] for place in places}))
    rows.reverse()
    chosen.reverse()
    height = _ROW * len(layers) + 2 * _MARGIN
    ys = [height - _MARGIN - _ROW * i for i in range(len(rows))]
    xs = [{node: WIDTH * (i + 0.5) / len(row) for i, node in enumerate(row)} for row in rows]
    ends = ["input", *["hidden"] * (len(rows) - 2), "output"]
    nodes = [
        Node(str(node), x, y, end)
        for places_x, y, end in zip(xs, ys, ends, strict=True)
        for node, x in places_x.items()
    ]
    edges = [
        edge
        for layer, places, below, above, y in zip(layers, chosen, xs, xs[1:], ys, strict=False)
        for edge in _place_edges(layer, places, below, above, y)
    ]
    return Diagram(tuple(nodes), tuple(edges), height, tuple(_notes(layers, rows, chosen)))


def _strongest(values: Array, most: int) -> list[int]:
    return sorted(np.argsort(-values, kind="stable")[:most].tolist())


def _choose_edges(layer: LayerCurves, share: Array, outputs: Sequence[int]) -> list[int]:
    """Choose the edges that count most: one for each output, then whichever follow."""
    output, feature = np.divmod(layer.edges, layer.in_features)
    scores = np.nan_to_num(layer.importance) * share[output]
    order = np.argsort(-scores, kind="stable")
    order = order[np.isin(output[order], outputs)]
    first: list[int] = []
    for node in outputs:
        of_node = order[output[order] == node]
        first += of_node[:1].tolist()
    inputs: set[int] = set()
    kept: list[int] = []
    for place in dict.fromkeys([*first, *order.tolist()]):
        if len(kept) == _MOST_EDGES:
            break
        if int(feature[place]) in inputs or len(inputs) < _MOST_NODES:
            inputs.add(int(feature[place]))
            kept.append(place)
    return kept


def _place_edges(
    layer: LayerCurves,
    places: Sequence[int],
    below: dict[int, float],
    above: dict[int, float],
    y: float,
) -> list[Edge]:
    """Place a layer's edges side by side, in the order of their ends so that few lines cross."""
    middle = {place: _middle(layer, place, below, above) for place in places}
    order = sorted(places, key=lambda place: (middle[place], *layer.ends(place)))
    strongest = max((float(np.nan_to_num(layer.importance[place])) for place in places), default=0)
    edges = []
    for i, place in enumerate(order):
        feature, output = layer.ends(place)
        value = float(np.nan_to_num(layer.importance[place]))
        centre = (WIDTH * (i + 0.5) / len(order), y - _ROW / 2)
        edges.append(
            Edge(
                title=f"input {feature} to output {output}, importance {value:.3g}",
                start=(below[feature], y),
                frame=centre,
                stop=(above[output], y - _ROW),
                opacity=_FAINTEST + (1 - _FAINTEST) * (value / strongest if strongest else 0),
                curve=_fit(layer, place, centre),
            )
        )
    return edges


def _middle(
    layer: LayerCurves, place: int, below: dict[int, float], above: dict[int, float]
) -> float:
    feature, output = layer.ends(place)
    return below[feature] + above[output]


def _fit(layer: LayerCurves, place: int, centre: tuple[float, float]) -> Array:
    """Bring a curve over the grid, without its margins, into its frame, to the frame's height."""
    curve = layer.curve(place)
    per_interval = layer.steps + 1
    inside = slice(layer.order * per_interval, len(curve.x) - layer.order * per_interval)
    x, y = curve.x[inside], np.nan_to_num(curve.total[inside])
    low, high = y.min(), y.max()
    width, height = BOX[0] - 2 * _INSIDE, BOX[1] - 2 * _INSIDE
    with np.errstate(over="ignore", invalid="ignore"):
        across = np.nan_to_num((x - x[0]) / (x[-1] - x[0]))
        up = np.nan_to_num((y - low) / (high - low)) if high > low else np.full_like(y, 0.5)
    points = np.stack([centre[0] + (across - 0.5) * width, centre[1] - (up - 0.5) * height], axis=1)
    every = max(1, len(points) // 80)
    return points[::every] if layer.order else points


def _notes(
    layers: Sequence[LayerCurves], rows: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]]
) -> list[str]:
    notes = []
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    for i, (layer, row, places) in enumerate(zip(layers, rows, chosen, strict=False)):
        all_edges = layer.in_features * layer.out_features
        if len(places) < all_edges:
            notes.append(
                f"{layer.name}: {len(places)} of {all_edges:,} edges, "
                f"{len(row)} of {widths[i]:,} inputs, "
                f"{len(rows[i + 1])} of {widths[i + 1]:,} outputs"
            )
    return notes
