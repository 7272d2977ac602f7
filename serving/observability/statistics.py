"""What a version of a model has answered since it was loaded, in the terms of ModelStatistics.

Triton's tools read it, perf_analyzer first of all: for every request where its time went, and for
every run how many rows it had. It is counted in this process; where there are several workers, each
tells of itself alone.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protos import inference_pb2 as pb

_NS = 1e9  # in a second


class Spent(NamedTuple):
    """What one request took, in seconds.

    Args:
        request: From the message's arrival to the answer, serialised.
        parse: Reading its tensors.
        queue: Before its first run: with batch_wait, and until there was a slot.
        batch_wait: Of that, waiting for others to run with.
        compute: All its runs.
        serialise: Writing the answer.
    """

    request: float
    parse: float
    queue: float
    batch_wait: float
    compute: float
    serialise: float


@dataclass
class Duration:
    """How often something has happened, and how long it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count it so many times more, which took so long together."""
        self.count += count
        self.ns += round(seconds * _NS)

    def message(self) -> pb.StatisticDuration:
        """Put it as the protocol does."""
        return pb.StatisticDuration(count=self.count, ns=self.ns)


class Statistics:
    """Of one version of a model. Safe to use from several threads.

    Args:
        model: Its name.
        version: Of it.
    """

    def __init__(self, model: str, version: int) -> None:
        self.model = model
        self._version = version
        self._lock = threading.Lock()
        self._rows = 0
        self._last_run_ns = 0  # since 1970
        self._success, self._fail = Duration(), Duration()
        self._queue = Duration()
        self._input, self._infer, self._output = Duration(), Duration(), Duration()
        self._runs: dict[int, Duration] = {}  # by their rows, of which limits allow only so many

    def count_run(self, rows: int, seconds: float) -> None:
        """Count a run of the model that gave answers, for one request or for several."""
        with self._lock:
            self._last_run_ns = time.time_ns()
            run = self._runs.get(rows)
            if run is None:
                run = self._runs[rows] = Duration()
            run.add(seconds)

    def count_answers(self, rows: Sequence[int], spent: Sequence[Spent]) -> None:
        """Count requests that were answered, each with its rows and what it took."""
        count = len(rows)
        sums = Spent(*map(sum, zip(*spent, strict=True)))
        with self._lock:
            self._rows += sum(rows)
            self._success.add(sums.request, count)
            self._queue.add(sums.queue, count)
            self._input.add(sums.parse, count)
            self._infer.add(sums.compute, count)
            self._output.add(sums.serialise, count)

    def count_failure(self, seconds: float) -> None:
        """Count a request that was refused, failed, expired or was cancelled."""
        with self._lock:
            self._fail.add(seconds)

    def message(self) -> pb.ModelStatistics:
        """Put it as the protocol does.

        Tensors are read and written for each request, not for each run: runs have no times of that.
        """
        with self._lock:
            return pb.ModelStatistics(
                name=self.model,
                version=str(self._version),
                last_inference=self._last_run_ns // 10**6,
                inference_count=self._rows,
                execution_count=sum(run.count for run in self._runs.values()),
                inference_stats=pb.InferStatistics(
                    success=self._success.message(),
                    fail=self._fail.message(),
                    queue=self._queue.message(),
                    compute_input=self._input.message(),
                    compute_infer=self._infer.message(),
                    compute_output=self._output.message(),
                ),
                batch_stats=[
                    pb.InferBatchStatistics(batch_size=rows, compute_infer=run.message())
                    for rows, run in sorted(self._runs.items())
                ],
            )
