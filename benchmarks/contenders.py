"""The ways to run a KAN that are compared: which file (files.py) each needs, and how it is run.

Files are written by one process and may be read by another that measures memory, so every runtime
is imported where it is used: who runs onnxruntime or OpenVINO has no torch in memory.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

import kan_ops
from benchmarks.files import OUR_INLINE, OUR_ONNX, OUR_SCRIPT

if TYPE_CHECKING:
    from torch import Tensor


ORDER = 3
"""Spline order of every model."""

Knots = Literal["uniform", "adapted"]
Call = Callable[[], Any]
"""Runs a model once on inputs bound beforehand; what it gives, `np.asarray` makes an array."""
Bind = Callable[[NDArray[np.float32]], Call]
"""Takes inputs, shape (batch, in), into the form a loaded model wants."""


@dataclass(frozen=True)
class Model:
    """What is run: widths from input to output, intervals of the grid, and the knots' kind."""

    widths: tuple[int, ...]
    grid_size: int
    knots: Knots

    @property
    def bases(self) -> int:
        """Columns of the weights for each input: G + k basis functions and the base path."""
        return self.grid_size + ORDER + 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in float32, the scaler folded in."""
        return sum(4 * n * m * self.bases for n, m in pairwise(self.widths))

    def __str__(self) -> str:
        return f"{list(self.widths)}, grid {self.grid_size}, {self.knots} knots"


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Args:
        name: What tables call it.
        meaning: What it is, in a line.
        modules: Imported before its memory is counted; the first may not be installed.
        file: Which of `files.WRITERS` makes what `load` reads.
        load: From that file and a number of threads to something that takes inputs.
        compiles: Whether it needs a C++ compiler.
        library: Whether it needs the library of kan_ops.
        answers: Whether it computes the model's outputs.
    """

    name: str
    meaning: str
    modules: tuple[str, ...]
    file: str
    load: Callable[[Path, int], Bind]
    compiles: bool = False
    library: bool = False
    answers: bool = True

    def missing(self) -> str | None:
        """Say what it lacks on this machine; None if nothing."""
        package = self.modules[0].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if self.library and kan_ops.library_path() is None:
            return "the library of kan_ops was not built"
        compiler = os.environ.get("CXX", "g++")
        if self.compiles and shutil.which(compiler) is None:
            return f"there is no C++ compiler ({compiler})"
        return None


# --- Runtimes: from a file to calls. -------------------------------------------------------------


def _torch_calls(program: Callable[["Tensor"], "Tensor"]) -> Bind:
    import torch

    def bind(x: NDArray[np.float32]) -> Call:
        tensor = torch.from_numpy(x)

        @torch.no_grad()
        def call() -> "Tensor":
            return program(tensor)

        return call

    return bind


def _load_eager(path: Path, threads: int) -> Bind:
    import torch

    torch.set_num_threads(threads)
    return _torch_calls(torch.load(path, weights_only=False))  # this project wrote it just now


def _load_torchscript(path: Path, threads: int) -> Bind:
    import torch

    torch.set_num_threads(threads)
    frozen = torch.jit.freeze(torch.jit.load(path).eval())
    return _torch_calls(torch.jit.optimize_for_inference(frozen))


def _load_compiled(path: Path, threads: int) -> Bind:
    """Compile for one batch size: the next `bind` with another one compiles again."""
    import torch

    torch.set_num_threads(threads)
    # All models share the code of KAN.forward, and what was compiled for others counts against the
    # limit of recompilations.
    torch._dynamo.reset()
    kan = torch.load(path, weights_only=False)
    options: dict[str, Any] = {"freezing": True}
    return _torch_calls(torch.compile(kan, dynamic=False, fullgraph=True, options=options))


def _load_package(path: Path, threads: int) -> Bind:
    import torch

    torch.set_num_threads(threads)
    return _torch_calls(torch._inductor.aoti_load_package(str(path)))


def _session(path: Path, threads: int, *, fused: bool = False) -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if fused:
        kan_ops.register(options)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _load_onnxruntime(path: Path, threads: int, *, fused: bool = False) -> Bind:
    session = _session(path, threads, fused=fused)
    name = session.get_inputs()[0].name

    def bind(x: NDArray[np.float32]) -> Call:
        feed = {name: x}
        return lambda: session.run(None, feed)[0]

    return bind


def _load_products(path: Path, threads: int) -> Bind:
    session = _session(path, threads)
    widths = {tensor.name: tensor.shape[1] for tensor in session.get_inputs()}

    def bind(x: NDArray[np.float32]) -> Call:
        random = np.random.default_rng(0)
        shapes = {name: (len(x), width) for name, width in widths.items()}
        feed = {name: random.random(shape, np.float32) for name, shape in shapes.items()}
        return lambda: session.run(None, feed)

    return bind


def _load_torch_products(path: Path, threads: int) -> Bind:
    import torch

    torch.set_num_threads(threads)
    weights = [layer.scaled_spline_weight for layer in torch.load(path, weights_only=False).layers]
    shapes = [(weight.shape[1] * (weight.shape[2] + 1), weight.shape[0]) for weight in weights]
    products = [torch.rand(shape) for shape in shapes]

    def bind(x: NDArray[np.float32]) -> Call:
        columns = [torch.rand(len(x), rows) for rows, _ in shapes]

        def call() -> None:
            for left, right in zip(columns, products, strict=True):
                torch.mm(left, right)

        return call

    return bind


def _load_identity(path: Path, threads: int) -> Bind:
    """Make a session that gives back one of its inputs: what calling onnxruntime costs."""
    session = _session(path, threads)

    def bind(x: NDArray[np.float32]) -> Call:
        feed = {"x": x}
        return lambda: session.run(None, feed)

    return bind


def _load_openvino(path: Path, threads: int) -> Bind:
    import openvino

    # By default it computes in bfloat16 where the processor can, which is another arithmetic.
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()

    def bind(x: NDArray[np.float32]) -> Call:
        return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0]

    return bind


_TORCH = ("torch", "kan_model")
_INDUCTOR = ("torch", "kan_model", "torch._dynamo", "torch._inductor.compile_fx")

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("eager", "the model in PyTorch, no_grad", _TORCH, "kan.pt", _load_eager),
        Contender(
            "torchscript",
            "the model as it is, traced, frozen, optimised for inference",
            ("torch",),
            "trace.ts",
            _load_torchscript,
        ),
        Contender(
            "torch.compile",
            "default mode, freezing, compiled for each batch size",
            _INDUCTOR,
            "kan.pt",
            _load_compiled,
            compiles=True,
        ),
        Contender(
            "AOTInductor",
            "compiled ahead of time, freezing, one package for every batch size",
            ("torch", "torch._inductor"),
            "package.pt2",
            _load_package,
            compiles=True,
        ),
        Contender(
            "traced",
            "the model as it is through torch.onnx.export, in onnxruntime",
            ("onnxruntime",),
            "naive.onnx",
            _load_onnxruntime,
        ),
        Contender(
            "openvino",
            "the same file in OpenVINO, in float32",
            ("openvino",),
            "naive.onnx",
            _load_openvino,
        ),
        Contender(
            "openvino on ours",
            "kanserve's model.onnx, exported with --inline, in OpenVINO, in float32",
            ("openvino",),
            OUR_INLINE,
            _load_openvino,
        ),
        Contender(
            "kanserve torchscript",
            "kanserve's model.ts, frozen, optimised for inference",
            ("torch",),
            OUR_SCRIPT,
            _load_torchscript,
        ),
        Contender(
            "kanserve",
            "kanserve's model.onnx in onnxruntime, on standard operators",
            ("onnxruntime",),
            OUR_ONNX,
            _load_onnxruntime,
        ),
        Contender(
            "kanserve fused",
            "the same file in onnxruntime, on the operator of kan_ops",
            ("onnxruntime",),
            OUR_ONNX,
            partial(_load_onnxruntime, fused=True),
            library=True,
        ),
        Contender(
            "product",
            "the layers' matrix products alone, in onnxruntime "
            "(what they are fed counts as its memory)",
            ("onnxruntime",),
            "products.onnx",
            _load_products,
            answers=False,
        ),
        Contender(
            "torch product",
            "the same in PyTorch",
            ("torch", "kan_model"),
            "kan.pt",
            _load_torch_products,
            answers=False,
        ),
        Contender(
            "identity",
            "an onnxruntime session that gives back its input: what a call costs",
            ("onnxruntime",),
            "identity.onnx",
            _load_identity,
            answers=False,
        ),
    )
}
"""By name, in the order of tables."""


def find_contender(text: str) -> str:
    """Find a contender's name from how a person types it: any case, hyphens for spaces.

    Raises:
        KeyError: There is none of this name.
    """
    return {name.lower(): name for name in CONTENDERS}[text.lower().replace("-", " ")]


def cycled(x: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """Repeat rows until there are as many as wanted; shape (n, in) to (rows, in)."""
    return np.ascontiguousarray(x[np.arange(rows) % len(x)])


def answers(bind: Bind, x: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    """Run every row in batches of one size, the last one filled up; (n, in) to (n, out).

    What is compiled for a batch size runs at no other, and kernels differ from size to size.
    """
    parts: Sequence[NDArray[np.float32]] = [
        np.array(bind(cycled(x[start:], batch))(), copy=True) for start in range(0, len(x), batch)
    ]
    return np.concatenate(parts)[: len(x)]
