"""The fused operator in a model of its own, and what it is to answer, in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy.special import erfc

import kan_ops

Array = NDArray[np.float32]
Exact = NDArray[np.float64]

BASIS = 2e-7
SHARE = 5e-7

ALL_INSTRUCTIONS = ("avx512vbmi2", "avx512", "avx2", "portable")


def available(instructions: str) -> bool:
    options = onnxruntime.SessionOptions()
    try:
        kan_ops.register(options, instructions)
    except Exception:  # onnxruntime's exceptions share no base class of their own
        return False
    return True


INSTRUCTIONS = [name for name in ALL_INSTRUCTIONS if available(name)]


@dataclass(frozen=True)
class Operator:
    """One layer: knots (G + 2k + 1, in), weights (G + k + 1, in, out) in the order of functions."""

    order: int
    knots: Array
    weights: Array
    groups: int = 1
    scale: float = 1.0
    activation: str = "silu"

    @property
    def functions(self) -> int:
        return len(self.weights) - 1

    def model(self, **attributes: object) -> onnx.ModelProto:
        """Write the layer; without a body, so that nothing but the operator can answer."""
        count, features, outputs = self.weights.shape
        order = [f for group in range(self.groups) for f in range(group, count - 1, self.groups)]
        weight = self.weights[[*order, count - 1]].reshape(count * features, outputs)
        own = {
            "order": self.order,
            "grid_size": self.functions - self.order,
            "groups": self.groups,
            "scale": self.scale,
            "activation": self.activation,
        }
        node = helper.make_node(
            kan_ops.OPERATOR,
            ["x", "knots", "weight"],
            ["y"],
            domain=kan_ops.DOMAIN,
            **(own | attributes),  # type: ignore[arg-type]
        )
        graph = helper.make_graph(
            [node],
            "operator",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", features])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
            [
                numpy_helper.from_array(self.knots, "knots"),
                numpy_helper.from_array(weight, "weight"),
            ],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(kan_ops.DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def columns(self, x: Array) -> Exact:
        """Compute what the weights are multiplied with, shape (rows, G + k + 1, in)."""
        finite = np.isfinite(x)
        exact = np.where(finite, x, 0).astype(np.float64)
        basis = recursion(exact, self.knots.astype(np.float64), self.order) / self.scale
        base = ACTIVATIONS[self.activation](exact)
        columns: Exact = np.concatenate([basis, base[:, None]], axis=1)
        columns[np.broadcast_to(~finite[:, None], columns.shape)] = np.nan
        return columns

    def answers(self, x: Array) -> tuple[Exact, Exact]:
        """Answer in float64; beside it the sum of the errors to be expected, both (rows, out).

        A function may be off by `BASIS` wherever it does not vanish. Of the size of a term that
        grows with its own and with those added to it, `SHARE` may be lost.
        """
        columns, weights = self.columns(x), self.weights.astype(np.float64)
        length = self.order + 1
        at, knots = x[:, None], self.knots[None]
        supported = (at >= knots[:, :-length]) & (at < knots[:, length:])
        off = SHARE * np.abs(columns)
        off[:, :-1] += BASIS / self.scale * supported
        answers: Exact = np.einsum("rfi,fio->ro", columns, weights)
        allowed: Exact = np.einsum("rfi,fio->ro", off, np.abs(weights))
        return answers, allowed


def _silu(x: Exact) -> Exact:
    y: Exact = x / (1 + np.exp(-np.clip(x, -700, 700)))
    return y


ACTIVATIONS: dict[str, Callable[[Exact], Exact]] = {
    "silu": _silu,
    "gelu": lambda x: x * 0.5 * erfc(-x / np.sqrt(2)),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "identity": lambda x: x,
}


def recursion(x: Exact, knots: Exact, order: int) -> Exact:
    """Evaluate all functions, shape (rows, G + k, in), by Cox-de Boor, from its definition."""
    t, x = knots[None], x[:, None]
    basis: Exact = ((x >= t[:, :-1]) & (x < t[:, 1:])).astype(np.float64)
    for p in range(1, order + 1):
        rising = (x - t[:, : -p - 1]) / (t[:, p:-1] - t[:, : -p - 1])
        falling = (t[:, p + 1 :] - x) / (t[:, p + 1 :] - t[:, 1:-p])
        basis = rising * basis[:, :-1] + falling * basis[:, 1:]
    return basis


def make_knots(
    features: int, grid_size: int, order: int, *, adapted: bool, rng: np.random.Generator
) -> Array:
    """Make rising knots around [-1, 1], equally spaced or moved by up to 0.45 of a step."""
    step = 2 / grid_size
    knots = np.arange(-order, grid_size + order + 1)[:, None] * step - 1
    knots = np.repeat(knots, features, axis=1)
    if adapted:
        knots += rng.uniform(-0.45, 0.45, knots.shape) * step
    return knots.astype(np.float32)


def session(
    model: onnx.ModelProto, instructions: str | None = None, threads: int = 1
) -> onnxruntime.InferenceSession:
    """Load a model with the library."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    kan_ops.register(options, instructions)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(
    model: onnx.ModelProto, x: Array, instructions: str | None = None, threads: int = 1
) -> Array:
    answers: Sequence[Array] = session(model, instructions, threads).run(None, {"x": x})
    return answers[0]
