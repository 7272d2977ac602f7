"""Operators of ONNX that torch has no name for: one node in a graph, a formula in TorchScript."""

import torch
from torch import Tensor


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


def quantize(values: Tensor, step: float, zero: int) -> Tensor:
    """Round to multiples of a step, as uint8 with a zero point; outside TorchScript, in float32."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "QuantizeLinear",
            [values, torch.tensor(step), torch.tensor(zero, dtype=torch.uint8)],
            dtype=torch.uint8,
            shape=values.shape,
        )
    return (values / step).round().add(zero).clamp(0, 255)


def matmul_integer(left: Tensor, right: Tensor, zero: int) -> Tensor:
    """Multiply (rows, n) of uint8 with a zero point and (n, out) of int8, to float32.

    TorchScript sums up the same whole numbers in float32, which has no such product on CPU.
    """
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "MatMulInteger",
            [left, right, torch.tensor(zero, dtype=torch.uint8)],
            dtype=torch.int32,
            shape=(left.shape[0], right.shape[1]),
        ).float()
    return (left - zero) @ right.float()
