"""The numbers in a report: written for its script, and read again for plots.

One block of JSON that is no script; arrays in it are base64 of little-endian numbers, float32 where
they are real. How many of a large layer's edges and inputs there is room for is decided here.
"""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.curves import LayerCurves, curve_points, has_common_knots, steps_between
from export.report_page.distribution import BINS, Distribution
from kan_model import KANLinear

FORMAT = 1

_EDGES = 2_400_000  # bytes of all edges before base64, which makes them a third more
_INPUTS = 700_000  # bytes of all knots and what is told of inputs
_BLOCK = re.compile(
    rb'<script type="application/json" id="data">(.*?)</script>', re.DOTALL | re.IGNORECASE
)


@dataclass(frozen=True)
class Room:
    """How much of a layer a report holds."""

    edges: int
    inputs: int


@dataclass(frozen=True)
class LayerData:
    """What a report tells of a layer.

    Attributes:
        curves: Its edges.
        attribution: Of each of `curves.inputs`, shape (inputs,).
        distribution: Of all its inputs; None without samples.
    """

    curves: LayerCurves
    attribution: NDArray[np.float64]
    distribution: Distribution | None


def share_room(layers: Sequence[KANLinear]) -> list[Room]:
    """Share a report's room among layers: small ones are there as a whole, large ones in part."""
    of_edge = [4 * (layer.spline_weight.shape[2] + 3) for layer in layers]
    of_input = [4 * BINS + 32 + _bytes_of_knots(layer) for layer in layers]
    edges = _share(
        _EDGES,
        [
            cost * layer.in_features * layer.out_features
            for cost, layer in zip(of_edge, layers, strict=True)
        ],
    )
    inputs = _share(
        _INPUTS, [cost * layer.in_features for cost, layer in zip(of_input, layers, strict=True)]
    )
    return [
        Room(max(1, e // per_edge), max(1, i // per_input))
        for e, per_edge, i, per_input in zip(edges, of_edge, inputs, of_input, strict=True)
    ]


def _bytes_of_knots(layer: KANLinear) -> int:
    if has_common_knots(layer):
        return 0
    intervals = layer.grid.shape[1] - 1
    return 4 * (intervals + 1 + intervals * (steps_between(layer) + 1))


def _share(room: int, wanted: Sequence[int]) -> list[int]:
    """Give each what it wants, and where that is too much, those who want most the same."""
    given = [0] * len(wanted)
    left = room
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for done, i in enumerate(order):
        given[i] = min(wanted[i], left // (len(wanted) - done))
        left -= given[i]
    return given


def embed(layers: Sequence[LayerData], *, chain: bool) -> str:
    """Write the block's text. It holds no `<`, so that no name in it ends the block.

    Args:
        layers: In the network's order.
        chain: Whether each one's outputs are the next one's inputs.
    """
    content = {"format": FORMAT, "chain": chain, "layers": [_of_layer(layer) for layer in layers]}
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def read_embedded(page: bytes) -> tuple[list[LayerCurves], bool]:
    """Read the curves of a report again.

    Args:
        page: The bytes of report.html.

    Returns:
        The layers, and whether each one's outputs are the next one's inputs.

    Raises:
        ValueError: There is no such block, or it is of another format.
    """
    found = _BLOCK.search(page)
    if found is None:
        raise ValueError("expected a report of an export, found no curves in it")
    content = json.loads(found.group(1))
    known = content.get("format") if isinstance(content, dict) else None
    if known != FORMAT:
        raise ValueError(
            f"expected curves in format {FORMAT}, found {known!r}; use the kanserve that wrote the "
            "report, or export again"
        )
    try:
        return [_to_layer(layer) for layer in content["layers"]], bool(content["chain"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"its curves are damaged ({error}); export again") from error


def _of_layer(data: LayerData) -> dict[str, Any]:
    curves = data.curves
    content: dict[str, Any] = {
        "name": curves.name,
        "in": curves.in_features,
        "out": curves.out_features,
        "order": curves.order,
        "steps": curves.steps,
        "sampled": curves.sampled,
        "inputs": _pack(curves.inputs, "<u4"),
        "knots": _pack(curves.knots, "<f4"),
        "activation": _pack(curves.activation, "<f4"),
        "edges": _pack(curves.edges, "<u4"),
        "importance": _pack(curves.importance, "<f4"),
        "base": _pack(curves.base_weight, "<f4"),
        "spline": _pack(curves.coefficients, "<f4"),
        "attribution": _pack(data.attribution, "<f4"),
    }
    if data.distribution is not None:
        rows = curves.inputs
        told = data.distribution
        parts = np.concatenate([told.below[:, None], told.counts, told.above[:, None]], axis=1)
        content["samples"] = {
            "counts": _pack(np.minimum(parts[rows], 2**16 - 1), "<u2"),
            "low": _pack(told.low[rows], "<f4"),
            "high": _pack(told.high[rows], "<f4"),
        }
    return content


def _to_layer(content: dict[str, Any]) -> LayerCurves:
    def array(key: str, kind: str = "<f4") -> NDArray[Any]:
        return np.frombuffer(base64.b64decode(content[key]), kind)

    order, steps = int(content["order"]), int(content["steps"])
    edges = array("edges", "<u4").astype(np.int64)
    coefficients = array("spline").astype(np.float64).reshape(len(edges), -1)
    count = coefficients.shape[1] + order + 1
    knots = array("knots").astype(np.float64).reshape(-1, count)
    points = curve_points(knots, steps).shape[1]
    return LayerCurves(
        name=str(content["name"]),
        in_features=int(content["in"]),
        out_features=int(content["out"]),
        order=order,
        steps=steps,
        inputs=array("inputs", "<u4").astype(np.int64),
        knots=knots,
        activation=array("activation").astype(np.float64).reshape(-1, points),
        edges=edges,
        importance=array("importance").astype(np.float64),
        base_weight=array("base").astype(np.float64),
        coefficients=coefficients,
        sampled=bool(content["sampled"]),
    )


def _pack(values: NDArray[Any], kind: str) -> str:
    with np.errstate(over="ignore", invalid="ignore"):
        return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode()
