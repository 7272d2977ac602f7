"""onnxruntime: one session that runs one verified model on the provider that was asked for.

This module knows no gRPC and looks for no models. It never falls back: a session that is not on the
provider asked for is an error.
"""

import io
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

import kan_ops
from kan_bundle.errors import IntegrityError
from kan_bundle.manifest import Datatype, Manifest, TensorSpec
from serving.buffers import (
    BufferedRuns,
    bucket_sizes,
    drop_on_graph_thread,
    on_graph_thread,
)
from serving.errors import EngineError, InvalidRequest, StartupError
from serving.runtime import FATAL_ONLY, Provider, execution_provider

_ONNX_TYPES: dict[Datatype, str] = {
    "FP32": "tensor(float)",
    "INT64": "tensor(int64)",
    "INT32": "tensor(int32)",
    "UINT8": "tensor(uint8)",
    "BOOL": "tensor(bool)",
}


_KEEP_S = 10.0  # how long memory for a large batch is kept for another
_MUCH_LARGER = 4  # times the rows


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run.

    Args:
        provider: Where.
        threads: Threads one run may use.
        fused: Whether to run KANLinear layers by the operator of kan_ops.
        tf32: On CUDA, whether products may be computed with 10 bits of the mantissa.
        graph_rows: On CUDA, the largest batch that runs as a captured graph; 0 captures none.
    """

    provider: Provider = "cpu"
    threads: int = 1
    fused: bool = False
    tf32: bool = False
    graph_rows: int = 0


class Engine:
    """A model, ready to run. Safe to call from several threads at once.

    Args:
        model: Bytes of the ONNX file, verified.
        manifest: What the file was exported as.
        folder: Where the file of its weights lies, verified, if they are not in `model`.
        options: How to run it.

    Attributes:
        fused_layers: How many of the model's KANLinear layers run by the operator of kan_ops.
        placement: How many nodes run on which of onnxruntime's providers.

    Raises:
        IntegrityError: The file is no usable model, or its tensors are not the manifest's.
        StartupError: The session is not on the provider asked for.
        EngineError: Its runs cannot be captured as graphs.
    """

    def __init__(
        self, model: bytes, manifest: Manifest, folder: Path, options: EngineOptions
    ) -> None:
        self._buffered: BufferedRuns | None = None
        # Other versions of the operator have other names; onnxruntime runs the bodies of those.
        own = sum(layer.operator == kan_ops.OPERATOR for layer in manifest.layers)
        self.fused_layers = own if options.fused else 0
        session_options = _session_options(options, folder)
        if self.fused_layers:
            kan_ops.register(session_options)
        wanted = execution_provider(
            options.provider, tf32=options.tf32, graphs=bool(options.graph_rows)
        )
        try:
            with (
                redirect_stdout(io.StringIO()),
                _as_file(model) as file,
            ):  # it prints when it falls back
                self._session = onnxruntime.InferenceSession(
                    file, sess_options=session_options, providers=[wanted]
                )
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise IntegrityError(f"onnxruntime cannot load the model: {error}") from error
        self.placement = _placement(self._session)
        # A session falls back with no more than a log line, as a whole or node by node.
        if self._session.get_providers()[0] != wanted[0] or wanted[0] not in self.placement:
            raise StartupError(
                f"provider {options.provider} was asked for, but onnxruntime chose "
                f"{', '.join(self.placement)}: no usable device or driver was "
                "found; start with --provider cpu, or make the device visible"
            )
        _require_tensors(self._session.get_inputs(), manifest.inputs)
        _require_tensors(self._session.get_outputs(), manifest.outputs)
        self._inputs = [spec.name for spec in manifest.inputs]
        self._outputs = [spec.name for spec in manifest.outputs]
        # Runs of a CUDA session share one stream; two at once gain nothing and have crashed.
        self._alone: AbstractContextManager[Any] = (
            threading.Lock() if options.provider == "cuda" else nullcontext()
        )
        if options.graph_rows:
            tensors = (manifest.inputs, manifest.outputs)
            sizes = bucket_sizes(options.graph_rows)
            try:
                self._buffered = BufferedRuns(self._session, *tensors, sizes, options.provider)
            except Exception as error:
                raise EngineError(f"onnxruntime cannot capture its runs: {error}") from error
        self._largest_rows = 0
        self._largest_at = 0.0
        self._plain = _run_options(options)
        self._shrinking = _run_options(options, shrink=True)

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.float32]]:
        """Run one batch.

        Args:
            inputs: One array per input of the manifest, in its order, (rows, ...).

        Returns:
            One array per output of the manifest, in its order, with as many rows.

        Raises:
            InvalidRequest: The model does not take the values.
            EngineError: onnxruntime failed, or gave another number of rows.
        """
        try:
            if self._buffered is not None:
                outputs = on_graph_thread(self._run, inputs)
            else:
                with self._alone:
                    outputs = self._run(inputs)
        except InvalidArgument as error:  # a token beyond the vocabulary, for one
            raise InvalidRequest("the model does not take these values") from error
        except Exception as error:
            raise EngineError(f"onnxruntime failed: {error}") from error
        rows = inputs[0].shape[:1]
        if any(output.shape[:1] != rows for output in outputs):
            shapes = [output.shape for output in outputs]
            raise EngineError(f"{rows[0]} rows went in, but the outputs have shapes {shapes}")
        return outputs

    def __del__(self) -> None:
        if self._buffered is not None:
            held = [self._buffered, self._session]
            del self._buffered, self._session
            drop_on_graph_thread(held)

    def _run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.float32]]:
        rows = len(inputs[0])
        if self._buffered is not None and self._buffered.fits(rows):
            return self._buffered.run(inputs)
        feeds = dict(zip(self._inputs, inputs, strict=True))
        outputs: list[NDArray[np.float32]]
        outputs = self._session.run(self._outputs, feeds, self._options(rows))
        return outputs

    def _options(self, rows: int) -> onnxruntime.RunOptions:
        """Have the arena give back what a large batch needed if none has come for some time.

        Without an arena at all, runs of a thousand rows on standard operators take 1.3 to 1.6 times
        as long: benchmarks/results. Two threads that come here at once both do right.
        """
        now = time.monotonic()
        if rows >= self._largest_rows:
            self._largest_rows = rows
        if rows * _MUCH_LARGER > self._largest_rows:
            self._largest_at = now
        elif now - self._largest_at > _KEEP_S:
            self._largest_rows, self._largest_at = rows, now
            return self._shrinking
        return self._plain


def _session_options(options: EngineOptions, folder: Path) -> onnxruntime.SessionOptions:
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    session_options.inter_op_num_threads = 1
    session_options.log_severity_level = FATAL_ONLY
    entries = {
        # Idle pool threads otherwise spin for work after each run and burn a core.
        "session.intra_op.allow_spinning": "0",
        # Without it a model from bytes would look for its weights in the current folder.
        "session.model_external_initializers_file_folder_path": str(folder),
        "session.record_ep_graph_assignment_info": "1",
    }
    for key, value in entries.items():
        session_options.add_session_config_entry(key, value)
    return session_options


def _run_options(options: EngineOptions, *, shrink: bool = False) -> onnxruntime.RunOptions:
    """Say how a run goes that has no buffers of its own.

    Args:
        options: How the model is run.
        shrink: Whether arenas are to give back what no run needs at its end.
    """
    run_options = onnxruntime.RunOptions()
    if options.graph_rows:
        # A run that is not bound to buffers must not be captured; and graphs go on using memory of
        # the arena that they were captured with, so that must stay.
        run_options.add_run_config_entry("gpu_graph_id", "-1")
    elif shrink:
        arenas = "cpu:0;gpu:0" if options.provider == "cuda" else "cpu:0"
        run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arenas)
    return run_options


def _placement(session: onnxruntime.InferenceSession) -> Mapping[str, int]:
    """Count the nodes of a session by the provider that they run on."""
    nodes: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name] += len(part.get_nodes())
    return dict(nodes)


@contextmanager
def _as_file(model: bytes) -> Iterator[str | bytes]:
    """Give bytes the name of a file that nobody else can write, where the system has such files.

    onnxruntime parses a file without holding the interpreter's lock, and bytes with it: for 36 MB
    of weights, 20 ms in which no request moves.
    """
    if not hasattr(os, "memfd_create"):
        yield model
        return
    with os.fdopen(os.memfd_create("model.onnx", os.MFD_CLOEXEC), "wb") as file:
        file.write(model)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _require_tensors(found: list[Any], expected: tuple[TensorSpec, ...]) -> None:
    """Compare a session's tensors with the manifest's; a symbolic dimension is -1."""
    in_file = [
        (
            tensor.name,
            tensor.type,
            tuple(size if isinstance(size, int) else -1 for size in tensor.shape),
        )
        for tensor in found
    ]
    in_manifest = [(spec.name, _ONNX_TYPES[spec.datatype], spec.shape) for spec in expected]
    if in_file != in_manifest:
        raise IntegrityError(
            f"the model has tensors {in_file}, the manifest says {in_manifest}; export again"
        )
