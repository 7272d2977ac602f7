"""The product of a lowered layer, in float32 or, as an explicit option, with smaller weights.

Knots and basis stay in float32 always: converting a whole model to half precision makes knots of
nearly constant features coincide, and every answer NaN. The parts of the product are kept apart in
low precision, because they differ in kind: the basis lies between 0 and 1, the base path has no
bounds.

    fp16   weights in float16; the spline part is multiplied in float16, the base part in float32
    bf16   weights in bfloat16, multiplied in float32: onnxruntime has no bfloat16 product on CPU
    int8   weights in int8 with a scale for each output and part; the basis in uint8 over its known
           range, the base path in uint8 over the range that each row has of it, so that rows do not
           influence each other and nothing saturates
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from export.reference import RELATIVE_TOLERANCE
from export.symbolic import matmul_integer, quantize

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

TOLERANCE: Mapping[Precision, float] = {
    "fp32": RELATIVE_TOLERANCE,
    "fp16": 5e-3,
    "bf16": 3e-2,
    "int8": 1e-1,
}
"""Allowed |y - y64| as a share of the size of an output at ordinary inputs, or of |y64| if that is
more. What else is allowed in float32, and how its size is bounded, is in reference.py."""

_LEVELS = 127.0  # of int8, on either side of 0
_STEPS = 255.0  # of uint8
_MIDDLE = 128  # the zero of what may be negative, in uint8
_CLIPS = torch.linspace(0.6, 1.0, 17)  # shares of the largest weight, tried as ends of the scale


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
        weight: As for `Float32Product`.
        features: Width of the input.
        dtype: Of the weights, float16 or bfloat16.
    """

    base: Tensor
    spline: Tensor

    def __init__(self, weight: Tensor, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("spline", weight[:-features].to(dtype))
        self.register_buffer("base", weight[-features:].to(dtype))

    def forward(self, columns: Tensor) -> Tensor:
        """Multiply; shape (rows, in * (G + k + 1)) to (rows, out)."""
        spline, base = columns[:, : -self.features], columns[:, -self.features :]
        if self.spline.dtype == torch.float16:
            product = (spline.half() @ self.spline).float()
        else:
            product = spline @ self.spline.float()
        return product + base @ self.base.float()


class Int8Product(nn.Module):
    """A product of 8-bit numbers, summed up in 32 bits.

    Args:
        weight: As for `Float32Product`.
        features: Width of the input.
        peak: Largest value of the basis.
        columns: Rows of basis and base path to choose the scales on, shape (rows, weights).
    """

    base: Tensor
    base_scale: Tensor
    spline: Tensor
    spline_scale: Tensor

    def __init__(self, weight: Tensor, features: int, peak: float, columns: Tensor) -> None:
        super().__init__()
        self.features = features
        self.spline_step = peak / _STEPS
        parts = {"spline": slice(None, -features), "base": slice(-features, None)}
        for name, part in parts.items():
            rounded, scale = _quantized(weight[part], columns[:, part])
            self.register_buffer(name, rounded)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, columns: Tensor) -> Tensor:
        """Multiply; shape (rows, in * (G + k + 1)) to (rows, out)."""
        spline, base = columns[:, : -self.features], columns[:, -self.features :]
        reach = base.abs().amax(1, keepdim=True).clamp_min(1e-30)
        base_sum = matmul_integer(quantize(base / reach, 1 / _LEVELS, _MIDDLE), self.base, _MIDDLE)
        spline_sum = matmul_integer(quantize(spline, self.spline_step, 0), self.spline, 0)
        not_a_number = (0 * base).sum(1, keepdim=True)  # whole numbers cannot say it
        return (
            base_sum * (reach / _LEVELS) * self.base_scale
            + spline_sum * (self.spline_scale * self.spline_step)
            + not_a_number
        )


def _quantized(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to int8, with the scale of each output that is best on some rows.

    Args:
        weight: Shape (weights, out).
        columns: What they are multiplied with, shape (rows, weights).

    Returns:
        The rounded weights, shape (weights, out), and the scales, shape (out).
    """
    largest = weight.abs().amax(0).clamp_min(1e-30)
    least = torch.full_like(largest, torch.inf)
    scale = largest / _LEVELS
    for clip in _CLIPS.tolist():
        tried = clip * largest / _LEVELS
        off = columns @ (_rounded(weight, tried) * tried - weight)
        error = off.square().mean(0)
        scale = torch.where(error < least, tried, scale)
        least = torch.minimum(error, least)
    return _rounded(weight, scale).to(torch.int8), scale


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-_LEVELS, _LEVELS)
