"""The numbers in a report: written for its script, and read again for plots.

One block of JSON that is no script; arrays in it are base64 of little-endian numbers, float32 where
they are real. How many of a large layer's edges and inputs there is room for is decided here.
"""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.curves import LayerCurves, has_common_knots, steps_between
from export.report_page.distribution import BINS, Distribution
from kan_model import KANLinear

FORMAT = 1

_EDGES = 2_400_000  # bytes of all edges before base64, which makes them a third more
_INPUTS = 700_000  # bytes of all knots and what is told of inputs
_MOST_PARTS = 200_000  # of JSON; numbers are packed
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
        ValueError: There is no such block, it is of another format, or damaged.
    """
    found = _BLOCK.search(page)
    if found is None:
        raise ValueError("expected a report of an export, found no curves in it")
    try:
        written = found.group(1)
        if written.count(b",") + written.count(b"{") + written.count(b"[") > _MOST_PARTS:
            raise ValueError(f"expected at most {_MOST_PARTS:,} values")
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise _damaged(error) from error
    known = content.get("format") if isinstance(content, dict) else None
    if known != FORMAT:
        raise ValueError(
            f"expected curves in format {FORMAT}, found {known!r}; use the kanserve that wrote the "
            "report, or export again"
        )
    try:
        layers, chain = [_to_layer(layer) for layer in content["layers"]], bool(content["chain"])
        if chain:
            _require(
                all(a.out_features == b.in_features for a, b in pairwise(layers)),
                "each layer's outputs are the next one's inputs",
            )
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise _damaged(error) from error
    return layers, chain


def _damaged(error: Exception) -> ValueError:
    return ValueError(f"its curves are damaged ({error}); export again")


def _require(right: object, expected: str) -> None:
    if not right:
        raise ValueError(f"expected that {expected}")


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
    """Read a layer.

    Raises:
        ValueError: What is told of it does not fit together.
        KeyError: Something is missing; TypeError and others: it is of another type.
    """

    def array(key: str, kind: str = "<f4") -> NDArray[Any]:
        return np.frombuffer(base64.b64decode(content[key]), kind)

    order, steps = int(content["order"]), int(content["steps"])
    width, outputs = int(content["in"]), int(content["out"])
    _require(order >= 0 and steps >= 1, "order and steps are counts")
    _require(width >= 1 and outputs >= 1, "a layer has inputs and outputs")
    inputs = array("inputs", "<u4").astype(np.int64)
    _require((np.diff(inputs, prepend=-1) > 0).all(), "inputs rise")
    edges = array("edges", "<u4").astype(np.int64)
    _require(len(edges), "there are edges")
    # Edges are 32 bits wide.
    _require(edges.max() < width * outputs <= 2**32, "edges are those between inputs and outputs")
    _require((inputs < width).all(), "inputs are those of the layer")
    _require(np.isin(edges % width, inputs).all(), "edges begin at inputs that are told of")
    coefficients = array("spline").astype(np.float64).reshape(len(edges), -1)
    _require(coefficients.shape[1] > order, "a spline has more coefficients than its order")
    count = coefficients.shape[1] + order + 1
    knots = array("knots").astype(np.float64).reshape(-1, count)
    _require(len(knots) in (1, len(inputs)), "all inputs have knots, or the same")
    _require(np.isfinite(knots).all() and (np.diff(knots) >= 0).all(), "knots rise")
    _require((knots[:, 0] < knots[:, -1]).all(), "knots rise")
    activation = array("activation").astype(np.float64)
    activation = activation.reshape(len(knots), (count - 1) * (steps + 1))
    importance = array("importance").astype(np.float64)
    base = array("base").astype(np.float64)
    _require(len(importance) == len(base) == len(edges), "all edges have the same numbers")
    return LayerCurves(
        name=str(content["name"]),
        in_features=width,
        out_features=outputs,
        order=order,
        steps=steps,
        inputs=inputs,
        knots=knots,
        activation=activation,
        edges=edges,
        importance=importance,
        base_weight=base,
        coefficients=coefficients,
        sampled=bool(content["sampled"]),
    )


def _pack(values: NDArray[Any], kind: str) -> str:
    with np.errstate(over="ignore", invalid="ignore"):
        return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode()
