"""What is counted for Prometheus. This module knows models and their engines, not gRPC."""

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kan_bundle.layout import MODEL_FILE
from serving.budget import Budget
from serving.models.repository import Repository
from serving.observability.reports import report_path
from serving.observability.statistics import Spent, Statistics

REASONS = (
    *("shed", "memory", "expired", "cancelled", "invalid", "too_large", "unknown_method"),
    *("unavailable", "unauthorised", "failed"),
)
"""Why a call has no answer."""

_SECONDS = (
    *(base * 10**power for power in (-5, -4, -3, -2, -1) for base in (1.0, 2.5, 5.0)),
    *(1.0, 2.5, 5.0, 10.0),
)
_NOTED = 1024  # answers, before they are put into buckets, which then takes half a millisecond
_ROWS = tuple(float(4**power) for power in range(9))


_SPENT = {
    "request": "Time from the arrival of a request's message to its answer, serialised.",
    "parse": "Time in which a request's tensors were read.",
    "queue": "Time from the arrival of a request to its first run.",
    "batch_wait": "Of that, time in which it waited for others to run with.",
    "compute": "Time in which a request ran, with all that ran with it.",
    "serialise": "Time in which an answer was written.",
}


class _Histogram:
    """How many values fell between bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        places = np.searchsorted(self._bounds, values)  # a bucket holds its bound
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._sum += float(values.sum())

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Give what HistogramMetricFamily takes: counts up to each bound, and the sum."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        totals = self._counts.cumsum().astype(float).tolist()
        return list(zip(bounds, totals, strict=True)), self._sum


class _Taken:
    """The histograms of one model."""

    def __init__(self) -> None:
        self.rows = _Histogram(_ROWS)
        self.seconds = [_Histogram(_SECONDS) for _ in Spent._fields]

    def add(self, rows: Sequence[int], spent: Sequence[Spent]) -> None:
        """Count requests, each with its rows and what it took."""
        self.rows.add(np.array(rows, float))
        for histogram, seconds in zip(self.seconds, np.array(spent).T, strict=True):
            histogram.add(seconds)


class Counters(Collector):
    """What is counted as it happens, several times in every request: so it is numbers in tables.

    prometheus_client's own counters take ten times as long. Answers are only noted, which needs no
    lock, and put into their buckets many at a time. Nothing that a client names is a label before
    it is known to exist.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._refusals: Counter[str] = Counter()
        self._load_failures: Counter[str] = Counter(verification=0, system=0)
        self._rows: Counter[str] = Counter()
        self._outside: Counter[str] = Counter()
        self._taken: defaultdict[str, _Taken] = defaultdict(_Taken)
        self._answered: deque[tuple[str, Statistics, int, Spent]] = deque()

    def count_call(self, method: str, code: str, refusal: str | None = None) -> None:
        """Count a call by how it ended, and why it was refused if it was."""
        with self._lock:
            self._calls[method, code] += 1
            if refusal is not None:
                self._refusals[refusal] += 1

    def count_load_failure(self, *, transient: bool) -> None:
        """Count a version that could not be loaded."""
        with self._lock:
            self._load_failures["system" if transient else "verification"] += 1

    def count_rows(self, model: str, rows: int, outside: int | None) -> None:
        """Count rows that were run.

        Args:
            model: Which ran them.
            rows: How many.
            outside: Those of them outside of its grid; None if it has none that inputs reach as
                they are, which is not counted: a zero would say that all lie inside.
        """
        with self._lock:
            self._rows[model] += rows
            if outside is not None:
                self._outside[model] += outside

    def count_answer(self, method: str, statistics: Statistics, rows: int, spent: Spent) -> None:
        """Count a request that was answered.

        Args:
            method: Which was called.
            statistics: Of the version that has answered, where it is counted as well.
            rows: Of the request.
            spent: What it took.
        """
        self._answered.append((method, statistics, rows, spent))
        if len(self._answered) >= _NOTED:
            self.settle()

    def settle(self) -> None:
        """Count the answers that have been noted."""
        with self._lock:
            noted: defaultdict[Statistics, list[tuple[int, Spent]]] = defaultdict(list)
            for _ in range(len(self._answered)):  # others may come meanwhile
                method, statistics, rows, spent = self._answered.popleft()
                self._calls[method, "OK"] += 1
                noted[statistics].append((rows, spent))
            for statistics, answers in noted.items():
                columns = list(zip(*answers, strict=True))
                self._taken[statistics.model].add(*columns)
                statistics.count_answers(*columns)

    def collect(self) -> Iterator[Metric]:
        """List what Prometheus reads."""
        calls = CounterMetricFamily(
            "kanserve_calls",
            "Calls and messages of streams that have ended, by method and gRPC status code; "
            "methods that the server does not have are `unknown`.",
            labels=["method", "code"],
        )
        refusals = CounterMetricFamily(
            "kanserve_refusals",
            f"Calls without an answer, by reason: {', '.join(REASONS)}.",
            labels=["reason"],
        )
        failures = CounterMetricFamily(
            "kanserve_load_failures",
            "Versions that could not be loaded, by reason: verification (what is in the folder), "
            "system (memory, disk: the same files may load later).",
            labels=["reason"],
        )
        rows = CounterMetricFamily("kanserve_rows", "Rows that were run.", labels=["model"])
        outside = CounterMetricFamily(
            "kanserve_out_of_grid_rows",
            "Those among them with a feature outside of the grid that the model was trained on, "
            "where its splines are zero; only of models whose inputs reach a KANLinear layer as "
            "they are.",
            labels=["model"],
        )
        of_rows = HistogramMetricFamily(
            "kanserve_request_rows", "Rows in a request that was answered.", labels=["model"]
        )
        of_seconds = [
            HistogramMetricFamily(f"kanserve_{name}_seconds", _SPENT[name], labels=["model"])
            for name in Spent._fields
        ]
        self.settle()
        with self._lock:
            for labels, count in self._calls.items():
                calls.add_metric(labels, count)
            for reason in REASONS:
                refusals.add_metric([reason], self._refusals[reason])
            for reason, count in self._load_failures.items():
                failures.add_metric([reason], count)
            for family, counts in ((rows, self._rows), (outside, self._outside)):
                for model, count in counts.items():
                    family.add_metric([model], count)
            for model, taken in self._taken.items():
                of_rows.add_metric([model], *taken.rows.buckets())
                for histograms, histogram in zip(of_seconds, taken.seconds, strict=True):
                    histograms.add_metric([model], *histogram.buckets())
        yield from (calls, refusals, failures, rows, outside, of_rows, *of_seconds)


class BudgetCollector(Collector):
    """Describes the budget of bytes as it is when it is asked.

    Args:
        budget: Of this process.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def collect(self) -> Iterator[Metric]:
        """List what Prometheus reads."""
        yield GaugeMetricFamily(
            "kanserve_inflight_bytes",
            "Bytes of messages, with what they become, and of answers that are not taken yet.",
            value=self._budget.held + self._budget.in_transit,
        )
        yield GaugeMetricFamily(
            "kanserve_inflight_limit_bytes",
            "Bytes of them that there may be, from which on requests are rejected unread.",
            value=self._budget.limit,
        )


class ModelCollector(Collector):
    """Describes the models as they are when it is asked.

    Args:
        repository: What is served.
        is_ready: Whether the server takes requests.
    """

    def __init__(self, repository: Repository, is_ready: Callable[[], bool]) -> None:
        self._repository = repository
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        """List what Prometheus reads."""
        layers = GaugeMetricFamily(
            "kanserve_model_kan_layers",
            "KANLinear layers of a model version, by the way they run.",
            labels=["model", "version", "execution"],
        )
        nodes = GaugeMetricFamily(
            "kanserve_model_nodes",
            "Nodes of a model version's graph, by the provider of onnxruntime that runs them.",
            labels=["model", "version", "provider"],
        )
        states = GaugeMetricFamily(
            "kanserve_model_state",
            "1 for the state that a model version is in: READY, LOADING or UNAVAILABLE.",
            labels=["model", "version", "state", "reason"],
        )
        failed = GaugeMetricFamily(
            "kanserve_failed_versions",
            "Versions in the repository that have failed their checks; kanserve_model_state has "
            "the newest of them.",
            value=self._repository.failed,
        )
        waiting = GaugeMetricFamily(
            "kanserve_queue_rows", "Rows that wait to be run.", labels=["model"]
        )
        ready = GaugeMetricFamily(
            "kanserve_ready", "1 if the server takes requests, 0 before that and while it drains."
        )
        ready.add_metric([], float(self._is_ready()))
        infos = GaugeMetricFamily(
            "kanserve_model_info",
            "1 for a model version that is served, by the SHA-256 of its model.onnx, the path of "
            "its report on this port, empty if it has none, the threshold that it was pruned with, "
            "empty if it was not, and the values that its inputs accept, empty if all.",
            labels=["model", "version", "sha256", "report", "prune_threshold", "accepts"],
        )
        parity = GaugeMetricFamily(
            "kanserve_model_parity",
            "Largest error of a model version's files at export, as a share of what is allowed at "
            "that output, by the runtime that ran them.",
            labels=["model", "version", "runtime"],
        )
        for name, versions in self._repository.models.items():
            served = [version.model for version in versions.values() if version.model is not None]
            waiting.add_metric([name], sum(model.lane.rows for model in served))
            for number, version in versions.items():
                states.add_metric([name, str(number), version.state, version.reason], 1)
                if version.model is not None:
                    manifest = version.model.manifest
                    sha256 = manifest.files[MODEL_FILE].sha256
                    threshold = str(manifest.pruning.threshold) if manifest.pruning else ""
                    accepts = str(version.model.value_rules or "")
                    labels = [name, str(number), sha256, report_path(manifest), threshold, accepts]
                    infos.add_metric(labels, 1)
                    for record in manifest.parity:
                        parity.add_metric([name, str(number), record.runtime], record.excess)
                    fused = version.model.engine.fused_layers
                    standard = len(manifest.layers) - fused
                    layers.add_metric([name, str(number), "fused"], fused)
                    layers.add_metric([name, str(number), "standard"], standard)
                    for provider, count in version.model.engine.placement.items():
                        nodes.add_metric([name, str(number), provider], count)
        yield from (layers, nodes, states, failed, infos, parity, waiting, ready)
