"""Operators of ONNX that torch has no name for: one node in a graph, a formula in TorchScript."""

from collections.abc import Mapping

import torch
from torch import Tensor

import kan_ops

LAYER = "kanserve.layer"
"""Under which a node that `kan_linear` has written notes its layer."""


def ramp(distance: Tensor, top: float, slope: float) -> Tensor:
    """Compute max(0, top - slope * distance) for top at most 1 and a distance of at least 0."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "HardSigmoid",
            [distance],
            {"alpha": -slope, "beta": top},
            dtype=distance.dtype,
            shape=distance.shape,
        )
    return (top - slope * distance).clamp_min(0)


def quantize(values: Tensor, step: float) -> Tensor:
    """Round numbers of at least 0 to multiples of a step: uint8 in ONNX, float32 in TorchScript."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "QuantizeLinear",
            [values, torch.tensor(step, dtype=torch.float32), torch.tensor(0, dtype=torch.uint8)],
            dtype=torch.uint8,
            shape=values.shape,
        )
    return (values / step).round().clamp(0, 255)


def matmul_integer(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (rows, n) of uint8 and (n, out) of int8, to float32.

    Sums are exact to 2^31 in ONNX, and rounded in TorchScript, which has no such product on CPU.
    """
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "MatMulInteger",
            [left, right],
            dtype=torch.int32,
            shape=(left.shape[0], right.shape[1]),
        ).float()
    return left @ right.float()


def kan_linear(
    x: Tensor,
    knots: Tensor,
    weight: Tensor,
    attributes: Mapping[str, int | float | str],
    layer: str,
) -> Tensor:
    """Write the fused operator, whose inputs and attributes kan_ops/src/operator.cpp describes.

    Only for export to ONNX, which must give it the body of the layer (functions.py), whose name is
    noted on the node.
    """
    return torch.onnx.ops.symbolic(
        f"{kan_ops.DOMAIN}::{kan_ops.OPERATOR}",
        [x, knots, weight],
        dict(attributes),
        dtype=x.dtype,
        shape=(x.shape[0], weight.shape[1]),
        version=1,
        metadata_props={LAYER: layer},
    )
