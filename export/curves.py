"""What every edge of a KANLinear computes, and how much each counts: numbers, before any picture.

The edge from input i to output o is the function

    phi[o, i](x) = base_weight[o, i] * b(x) + scaler[o, i] * sum over c of w[o, i, c] * B[i, c](x)

Its importance is the standard deviation of phi over the values of input i: how much of what the
output varies comes through this edge. A constant edge has none, however far from zero it lies. The
values are those of the samples that reach the layer or, where there are none, evenly spread over
the grid.

The attribution of an input is the share of the outputs' variation that leads back to it: every
output has the same, and passes it down its edges in proportion to their importance. It is that of
KAN 2.0 (https://arxiv.org/abs/2408.10205, section 4.1) with the edges' sum in the place of the
node's own deviation, so that the shares of all inputs are one together.

All of it is float64. Nothing here draws, or changes a layer.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.moments import activate, measure_moments
from kan_model import KANLinear
from kan_model.splines import b_spline_basis

Array = NDArray[np.float64]

_BUDGET = 2**22  # numbers of one tensor: large layers go piece by piece
_POINTS = (
    72  # of a drawn curve, at least; each interval between two knots has as many as the others
)


@dataclass(frozen=True)
class Curve:
    """One edge at some points: phi is `base + spline`.

    Attributes:
        x: From the outermost knot on the left to that on the right; a knot within is there twice,
            as the end of one interval and the start of the next. Shape (points,).
        base: The base path, with its weight.
        spline: The spline, with its scaler. At a knot it is the limit from within the interval.
    """

    x: Array
    base: Array
    spline: Array

    @property
    def total(self) -> Array:
        """The edge's function, shape (points,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.base + self.spline


@dataclass(frozen=True)
class LayerCurves:
    """The edges of one layer, the most important first: all of them, or those that were asked for.

    Attributes:
        name: The layer's.
        in_features: Width of the input.
        out_features: Width of the output.
        order: k, the spline order.
        steps: Parts in which a curve crosses an interval between two knots.
        inputs: The inputs that are told of, among them those of all edges here, rising, shape
            (inputs,).
        knots: Of these inputs, shape (inputs, G + 2k + 1), or (1, G + 2k + 1) if all of the layer's
            have the same.
        activation: b at `curve_points` of the knots, shape (inputs, points) or (1, points).
        edges: Each edge as `o * in_features + i`, shape (edges,).
        importance: Shape (edges,), in units of the output; NaN if the weights are.
        base_weight: Shape (edges,).
        coefficients: Of the spline, scaler included, shape (edges, G + k).
        sampled: Whether the importance comes from samples.
    """

    name: str
    in_features: int
    out_features: int
    order: int
    steps: int
    inputs: NDArray[np.int64]
    knots: Array
    activation: Array
    edges: NDArray[np.int64]
    importance: Array
    base_weight: Array
    coefficients: Array
    sampled: bool

    @property
    def complete(self) -> bool:
        """Whether every edge of the layer is here."""
        return len(self.edges) == self.in_features * self.out_features

    def ends(self, place: int) -> tuple[int, int]:
        """Give the input and the output of the edge at a place of `edges`."""
        output, feature = divmod(int(self.edges[place]), self.in_features)
        return feature, output

    def place(self, feature: int, output: int) -> int | None:
        """Find the edge from an input to an output; None if it is not here."""
        if not 0 <= feature < self.in_features:
            return None
        found = np.flatnonzero(self.edges == output * self.in_features + feature)
        return int(found[0]) if found.size else None

    def matrix(self) -> Array:
        """Give the importance of every edge, zero where it is not known, shape (out, in)."""
        found = np.zeros(self.in_features * self.out_features)
        found[self.edges] = np.nan_to_num(self.importance)
        return found.reshape(self.out_features, self.in_features)

    def knots_of(self, feature: int) -> Array:
        """Give the knots of one of `inputs`, shape (G + 2k + 1,)."""
        knots: Array = self.knots[self._row(feature)]
        return knots

    def _row(self, feature: int) -> int:
        return 0 if len(self.knots) == 1 else int(np.searchsorted(self.inputs, feature))

    def curve(self, place: int) -> Curve:
        """Evaluate the edge at a place of `edges`."""
        row = self._row(self.ends(place)[0])
        x = curve_points(self.knots[row], self.steps)
        coefficients = self.coefficients[place]
        if self.order == 0:
            spline = np.repeat(coefficients, self.steps + 1)
        else:
            knots = torch.from_numpy(self.knots[row : row + 1])
            basis = b_spline_basis(torch.from_numpy(x)[:, None], knots, self.order)
            with np.errstate(invalid="ignore"):  # weights may be infinite
                spline = basis[:, 0].numpy() @ coefficients
        with np.errstate(over="ignore", invalid="ignore"):
            return Curve(x, self.base_weight[place] * self.activation[row], spline)


def curve_points(knots: Array, steps: int) -> Array:
    """Place the points of a curve: in each interval both ends, and so many equal parts.

    Args:
        knots: Shape (..., K).
        steps: Parts of an interval.

    Returns:
        Shape (..., (K - 1) * (steps + 1)).
    """
    left, right = knots[..., :-1, None], knots[..., 1:, None]
    points: Array = left + (right - left) * (np.arange(steps + 1) / steps)
    return points.reshape(*knots.shape[:-1], -1)


@dataclass(frozen=True)
class EdgeMoments:
    """Mean and standard deviation of every edge over some points, float64, shape (out, in) each."""

    mean: Tensor
    deviation: Tensor


def importance(layer: KANLinear, samples: Tensor | None = None) -> Tensor:
    """Measure every edge: the standard deviation of phi over the samples, or over the grid.

    Args:
        layer: As in `measure_edges`, as the other argument.
        samples: As above.

    Returns:
        Shape (out, in), float64, in units of the output.
    """
    return measure_edges(layer, samples).deviation


@torch.no_grad()
def measure_edges(layer: KANLinear, samples: Tensor | None = None) -> EdgeMoments:
    """Measure mean and standard deviation of phi over the samples, or over the grid.

    Args:
        layer: Its weights may be NaN, and then so is what is measured.
        samples: Of the layer's input, shape (..., in); values that are not finite are passed over.
            None takes points evenly spread over each input's grid.

    Returns:
        In units of the output.
    """
    weight, base = layer.spline_weight.detach(), layer.base_weight.detach()
    scaler = layer.spline_scaler.detach() if layer.enable_standalone_scale_spline else None
    out, features, functions = weight.shape
    mean, deviation = torch.empty(2, out, features, dtype=torch.float64)
    at_once = max(1, _BUDGET // (functions * (layer.spline_order + 4)))
    for first in range(0, features, at_once):
        some = slice(first, first + at_once)
        moments = measure_moments(layer, some, samples, _BUDGET)
        rows = max(1, _BUDGET // (min(at_once, features) * (functions + 1)))
        for start in range(0, out, rows):
            part = slice(start, start + rows)
            spline = weight[part, some].double()
            if scaler is not None:  # a piece at a time: the whole would be as large as the weights
                spline = spline * scaler[part, some, None]
            edges = base[part, some].double().cpu(), spline.cpu()
            mean[part, some] = moments.average(*edges)
            deviation[part, some] = moments.deviation(*edges)
    return EdgeMoments(mean, deviation)


def attribution(importances: Sequence[Array]) -> list[Array]:
    """Lead the outputs' variation back through a stack of layers.

    Args:
        importances: Of each layer's edges, from the first layer to the last, shapes (out, in).

    Returns:
        The score of every node: of the network's inputs, shape (in,), then of each layer's outputs.
        The scores of one layer sum to one, or less where nothing varies.
    """
    outputs = len(importances[-1])
    scores = [np.full(outputs, 1 / outputs)]
    for edges in reversed(importances):
        known = np.nan_to_num(edges, posinf=0.0)
        total = known.sum(axis=1, keepdims=True)
        share = np.divide(known, total, out=np.zeros_like(known), where=total > 0)
        scores.append(scores[-1] @ share)
    return scores[::-1]


@torch.no_grad()
def layer_curves(
    name: str,
    layer: KANLinear,
    measured: Tensor,
    *,
    sampled: bool,
    most_edges: int | None = None,
    most_inputs: int | None = None,
) -> LayerCurves:
    """Take what is to be known of a layer's edges.

    Args:
        name: Of the layer.
        layer: It is not changed.
        measured: From `importance`.
        sampled: Whether that was over samples.
        most_edges: Keep at most so many edges, the most important ones; None keeps all.
        most_inputs: And no more than come from so many inputs. Where edges come from fewer, others
            are told of too, those whose edges are the most important together.
    """
    values = measured.cpu().numpy()  # (out, in)
    kept = _largest(values.ravel(), values.size if most_edges is None else most_edges)
    inputs = np.arange(layer.in_features)
    if most_inputs is not None and most_inputs < len(inputs):
        first = np.sort(np.unique(kept % len(inputs), return_index=True)[1])  # edge of each input
        if len(first) > most_inputs:
            kept = kept[: first[most_inputs]]
        needed = np.unique(kept % len(inputs))
        others = _largest(np.nan_to_num(values).sum(axis=0), len(inputs))
        others = others[~np.isin(others, needed)][: most_inputs - len(needed)]
        inputs = np.sort(np.concatenate([needed, others]))
    output, feature = np.divmod(kept, layer.in_features)
    knots = layer.grid.detach().double().cpu()
    knots = knots[:1] if has_common_knots(layer) else knots[torch.from_numpy(inputs)]
    steps = steps_between(layer)
    points = torch.from_numpy(curve_points(knots.numpy(), steps))
    places = torch.from_numpy(output), torch.from_numpy(feature)
    weight = layer.spline_weight.detach()[places].double()
    if layer.enable_standalone_scale_spline:
        weight = weight * layer.spline_scaler.detach()[places].double()[:, None]
    return LayerCurves(
        name=name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        order=layer.spline_order,
        steps=steps,
        inputs=inputs,
        knots=knots.numpy(),
        activation=activate(layer, points).cpu().numpy(),
        edges=kept,
        importance=values.ravel()[kept],
        base_weight=layer.base_weight.detach()[places].double().cpu().numpy(),
        coefficients=weight.cpu().numpy(),
        sampled=sampled,
    )


def why_no_curves(layer: KANLinear) -> str | None:
    """Tell why the edges of a layer are no functions of one number each; None if they are."""
    x = torch.linspace(-2, 2, 2 * layer.in_features, dtype=torch.float64)
    x = x.reshape(2, layer.in_features)
    try:
        y = activate(layer, x)
    except Exception as error:  # a user's own activation may fail in any way
        told = str(error).partition("\n")[0]
        return f"fails on numbers of its own ({type(error).__name__}: {told})"
    is_of_one = False
    with suppress(Exception):  # in places that it does not know
        is_of_one = torch.allclose(y, activate(layer, x.T).T, equal_nan=True)
    return None if is_of_one else "goes by places, as PReLU with several slopes does"


def has_common_knots(layer: KANLinear) -> bool:
    """Tell whether all inputs of a layer have the same knots."""
    return bool((layer.grid == layer.grid[:1]).all())


def steps_between(layer: KANLinear) -> int:
    """Choose the parts in which a drawn curve crosses an interval between two knots."""
    return max(2, math.ceil(_POINTS / (layer.grid.shape[1] - 1)))


def _largest(values: Array, most: int) -> NDArray[np.int64]:
    """Find the places of the largest values, in falling order; NaN comes last."""
    few = np.arange(min(len(values), most))
    if most < len(values):  # piece by piece: the places of all take as much room as the values
        pieces = range(0, len(values), _BUDGET)
        few = np.concatenate([i + _few(values[i : i + _BUDGET], most) for i in pieces])
        few = np.sort(few[_few(values[few], most)])
    return few[np.argsort(_falling(values[few]), kind="stable")]


def _few(values: Array, most: int) -> NDArray[np.int64]:
    """Find the places of the largest values, in any order."""
    return np.argpartition(_falling(values), min(most, len(values) - 1))[:most]


def _falling(values: Array) -> Array:
    return np.where(np.isnan(values), np.inf, -values)
