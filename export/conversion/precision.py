"""The product of a lowered layer, in float32 or, as an explicit option, with smaller weights.

The basis is always computed in float32, from knots in float32: converting a whole model to half
precision makes knots of nearly constant features coincide, and every answer NaN. The parts of the
product are kept apart in low precision, because they differ in kind: the basis lies between 0 and
1, the base path has no bounds. Each part has a scale for each output.

    fp16   weights in float16, scaled by a power of two so that the largest is nearly 1, and
           multiplied in float32: what the file computes is then the network with rounded weights,
           and is proven as tightly as any other
    bf16   the same in bfloat16
    int8   weights in int8; the basis in 7 bits over its known range, because processors without
           VNNI add pairs of products in 16 bits, which 2 * 127 * 127 just fits; the base path,
           which has no range, is multiplied in float32
"""

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from export.conversion.symbolic import matmul_integer, quantize
from export.errors import InputError
from kan_bundle.manifest import Precision

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

COARSEST: Mapping[Precision, float] = {"fp16": 5e-3, "bf16": 3e-2, "int8": 1e-1}
"""Largest change of the answers that is accepted, as a share of their size.

Both are root mean squares, over all outputs and the rows of `ChangeRecord`."""

LEVELS = 127.0
"""Steps of the basis, and of int8 weights on either side of 0."""

_CLIPS = torch.linspace(0.6, 1.0, 17)  # shares of the largest weight, tried as ends of the scale
_OUTPUTS_AT_ONCE = 256  # of a large layer, which is as large again in every step


def check_precision(precision: str) -> Precision:
    """Let a known precision pass.

    Raises:
        InputError: It is none of `PRECISIONS`.
    """
    for known in PRECISIONS:
        if precision == known:
            return known
    raise InputError(f"--precision: expected {', '.join(PRECISIONS)}, found {precision!r}")


class Float32Product(nn.Module):
    """One product of float32.

    Args:
        weight: Shape (in * (G + k + 1), out), the `in` rows of the base path last.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, columns: Tensor) -> Tensor:
        """Multiply; shape (rows, in * (G + k + 1)) to (rows, out)."""
        return columns @ self.weight


class HalfProduct(nn.Module):
    """A product with weights of 16 bits.

    Args:
        spline: Weights of the basis, shape (in * (G + k), out).
        base: Weights of the base path, shape (in, out).
        dtype: Of the weights in the file, float16 or bfloat16.
    """

    base: Tensor
    base_scale: Tensor
    spline: Tensor
    spline_scale: Tensor

    def __init__(self, spline: Tensor, base: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        for name, weight in (("spline", spline), ("base", base)):
            largest = weight.abs().amax(0).clamp_min(2.0**-100)
            scale = torch.exp2(largest.log2().ceil())  # exact to divide by
            self.register_buffer(name, (weight / scale).to(dtype))
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, basis: Tensor, base: Tensor) -> Tensor:
        """Multiply; shapes (rows, in * (G + k)) and (rows, in) to (rows, out)."""
        spline = (basis @ self.spline.float()) * self.spline_scale
        return spline + (base @ self.base.float()) * self.base_scale


class Int8Product(nn.Module):
    """A product of 8-bit numbers, summed up in 32 bits, and of the base path with 8-bit weights.

    Args:
        spline: As for `HalfProduct`.
        base: As for `HalfProduct`.
        peak: Largest value of the basis.
        basis: Rows of it, to choose the scales on, shape (rows, in * (G + k)).
    """

    base: Tensor
    base_scale: Tensor
    spline: Tensor
    spline_scale: Tensor

    def __init__(self, spline: Tensor, base: Tensor, peak: float, basis: Tensor) -> None:
        super().__init__()
        self.step = peak / LEVELS
        rounded, scale = _quantized(spline, basis)
        self.register_buffer("spline", rounded)
        self.register_buffer("spline_scale", scale * self.step)
        rounded, scale = _quantized(base, None)
        self.register_buffer("base", rounded)
        self.register_buffer("base_scale", scale)

    def forward(self, basis: Tensor, base: Tensor) -> Tensor:
        """Multiply; shapes (rows, in * (G + k)) and (rows, in) to (rows, out)."""
        product = matmul_integer(quantize(basis, self.step), self.spline)
        return product * self.spline_scale + (base @ self.base.float()) * self.base_scale


def _quantized(weight: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round weights to int8, with a scale for each output.

    Args:
        weight: Shape (weights, out).
        columns: Rows that they are multiplied with, shape (rows, weights), on which the scales are
            to be best; None lets the largest weight decide.

    Returns:
        The rounded weights, shape (weights, out), and the scales, shape (out).
    """
    rounded = torch.empty_like(weight, dtype=torch.int8)
    scales = weight.abs().amax(0).clamp_min(1e-30) / LEVELS
    for start in range(0, weight.shape[1], _OUTPUTS_AT_ONCE):
        some = slice(start, start + _OUTPUTS_AT_ONCE)
        if columns is not None:
            scales[some] = _best_scale(weight[:, some], columns)
        rounded[:, some] = _rounded(weight[:, some], scales[some])
    return rounded, scales


def _best_scale(weight: Tensor, columns: Tensor) -> Tensor:
    """Try where the scale of each output may end; arguments are `_quantized`'s, shape (out)."""
    largest = weight.abs().amax(0).clamp_min(1e-30)
    best, least = largest / LEVELS, torch.full_like(largest, torch.inf)
    for clip in _CLIPS.tolist():
        scale = clip * largest / LEVELS
        off = columns @ (_rounded(weight, scale) * scale - weight)
        error = off.square().mean(0)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-LEVELS, LEVELS)
