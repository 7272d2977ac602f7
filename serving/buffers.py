"""Runs of a few fixed sizes over buffers that stay where they are.

A CUDA graph replays kernels on the addresses that it was captured with, so inputs are copied into
the same buffers on the device each time, and a batch is filled up to the next size.

onnxruntime keeps graphs for each thread that runs a session, so all runs are one thread's. And
while a graph is captured, CUDA refuses every thread that takes or frees memory of the device, which
breaks the capture, and in a destructor ends the process. So that thread frees sessions, too. No
session is made while another's runs are captured, because both are done by loads, one at a time:
`Keeper` sees to it. This module knows onnxruntime alone.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from kan_bundle.manifest import DATATYPES, TensorSpec

P = ParamSpec("P")
T = TypeVar("T")


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Choose the sizes: powers of two, and the largest batch."""
    return (*(2**i for i in range((max_rows - 1).bit_length())), max_rows)


def on_graph_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Have the one thread that captures and replays graphs do something, and wait for it."""
    end: Future[T] = Future()
    _graph_work().put(partial(_do, end, work, args, kwargs))
    try:
        return end.result()
    finally:
        del end  # an error in it holds this frame


def drop_on_graph_thread(held: list[Any]) -> None:
    """Empty a list there, which has the last references to what is to be freed.

    Destructors call this, and may be called in the midst of anything, also of this.
    """
    _graph_work().put(held.clear)


@cache
def _graph_work() -> "SimpleQueue[Callable[[], object]]":
    """Start the thread; give what it takes work from, whose `put` may come amid another `put`."""
    work: SimpleQueue[Callable[[], object]] = SimpleQueue()
    threading.Thread(target=_do_forever, args=(work,), name="graphs", daemon=True).start()
    return work


def _do_forever(work: "SimpleQueue[Callable[[], object]]") -> None:
    while True:
        work.get()()  # and nothing is kept of it


def _do(
    end: "Future[T]", work: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    try:
        end.set_result(work(*args, **kwargs))
    except BaseException as error:
        end.set_exception(error)
    finally:
        del end  # as above


@dataclass(frozen=True)
class _Bucket:
    """What runs batches of one size."""

    inputs: Sequence[Any]  # onnxruntime's OrtValue, on the device
    outputs: Sequence[Any]
    binding: Any
    options: onnxruntime.RunOptions


class BufferedRuns:
    """Runs a session in buckets.

    Args:
        session: What is run.
        inputs: Its inputs, the rows first.
        outputs: Its outputs, the same.
        sizes: Rows of the buckets, ascending. Each runs once to begin with: a graph is captured
            then, and not while somebody waits.
        device: Where they lie, in onnxruntime's words.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        sizes: Sequence[int],
        device: str,
    ) -> None:
        self._session = session
        self._inputs = inputs
        self._outputs = outputs
        self._device = device
        self._sizes = sizes
        self._buckets: dict[int, _Bucket] = {}
        # The largest first, so that the others find memory in the arena that it has taken.
        for size in reversed(sizes):  # one by one: other models run in between
            self._buckets[size] = on_graph_thread(self._make, size)

    def fits(self, rows: int) -> bool:
        """Whether a batch has a bucket."""
        return 0 < rows <= self._sizes[-1]

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a batch that fits, on the thread of graphs.

        Args:
            inputs: One array per input, (rows, ...).

        Returns:
            One array per output, with as many rows.
        """
        rows = len(inputs[0])
        size = next(size for size in self._sizes if size >= rows)
        bucket = self._buckets[size]
        for buffer, array in zip(bucket.inputs, inputs, strict=True):
            buffer.update_inplace(_filled_up(array, size))
        self._session.run_with_iobinding(bucket.binding, bucket.options)
        return [np.array(buffer.numpy()[:rows]) for buffer in bucket.outputs]

    def _make(self, size: int) -> _Bucket:
        binding = self._session.io_binding()
        inputs, outputs = (
            [
                onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    [size, *spec.shape[1:]], DATATYPES[spec.datatype], self._device, 0
                )
                for spec in specs
            ]
            for specs in (self._inputs, self._outputs)
        )
        for spec, buffer in zip(self._inputs, inputs, strict=True):
            binding.bind_ortvalue_input(spec.name, buffer)
        for spec, buffer in zip(self._outputs, outputs, strict=True):
            binding.bind_ortvalue_output(spec.name, buffer)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(size))  # each has a graph of its own
        for spec, buffer in zip(self._inputs, inputs, strict=True):
            buffer.update_inplace(np.zeros([size, *spec.shape[1:]], DATATYPES[spec.datatype]))
        self._session.run_with_iobinding(binding, options)
        return _Bucket(inputs, outputs, binding, options)


def _filled_up(array: NDArray[Any], size: int) -> NDArray[Any]:
    """Repeat the last row, which the model takes whatever its inputs mean."""
    missing = size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array
