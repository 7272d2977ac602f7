"""What a version of a model has answered since it was loaded, in the terms of ModelStatistics.

Triton's tools read it, perf_analyzer first of all: for every request where its time went, and for
every run how many rows it had. It is counted in this process; where there are several workers, each
tells of itself alone. Every request comes by here twice, so it is a few additions under a lock.
"""

import threading
import time
from dataclasses import dataclass

from protos import inference_pb2 as pb


@dataclass
class Duration:
    """How often something has happened, and how long it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count it once more."""
        self.count += 1
        self.ns += ns

    def message(self) -> pb.StatisticDuration:
        """Put it as the protocol does."""
        return pb.StatisticDuration(count=self.count, ns=self.ns)


class Statistics:
    """Of one version of a model. Safe to use from several threads; times are in nanoseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows = 0
        self._last_run_ns = 0  # since 1970
        self._success, self._fail = Duration(), Duration()
        self._queue = Duration()
        self._input, self._infer, self._output = Duration(), Duration(), Duration()
        self._runs: dict[int, Duration] = {}  # by their rows, of which limits allow only so many

    def count_run(self, rows: int, ns: int) -> None:
        """Count a run of the model that gave answers, for one request or for several."""
        with self._lock:
            self._last_run_ns = time.time_ns()
            run = self._runs.get(rows)
            if run is None:
                run = self._runs[rows] = Duration()
            run.add(ns)

    def count_answer(
        self,
        rows: int,
        *,
        total_ns: int,
        queue_ns: int,
        input_ns: int,
        infer_ns: int,
        output_ns: int,
    ) -> None:
        """Count a request that was answered.

        Args:
            rows: How many it had.
            total_ns: From its arrival to its answer.
            queue_ns: In line, until its first run.
            input_ns: Reading its tensors.
            infer_ns: In runs, also of other requests in them.
            output_ns: Writing the answer's tensors.
        """
        with self._lock:
            self._rows += rows
            self._success.add(total_ns)
            self._queue.add(queue_ns)
            self._input.add(input_ns)
            self._infer.add(infer_ns)
            self._output.add(output_ns)

    def count_failure(self, total_ns: int) -> None:
        """Count a request that was refused, failed, expired or was cancelled."""
        with self._lock:
            self._fail.add(total_ns)

    def message(self, name: str, version: str) -> pb.ModelStatistics:
        """Put it as the protocol does.

        Tensors are read and written for each request, not for each run: runs have no times of that.

        Args:
            name: Of the model.
            version: Of the model.
        """
        with self._lock:
            return pb.ModelStatistics(
                name=name,
                version=version,
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
