"""What is counted for Prometheus. This module knows models and their engines, not gRPC."""

import threading
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.repository import Repository


class Counters(Collector):
    """What is counted as it happens, several times in every request: so it is numbers in tables.

    prometheus_client's own counters take ten times as long.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._rows: Counter[str] = Counter()
        self._outside: Counter[str] = Counter()

    def count_call(self, method: str, code: str) -> None:
        """Count a call by how it ended."""
        with self._lock:
            self._calls[method, code] += 1

    def count_rows(self, model: str, rows: int, outside: int) -> None:
        """Count rows that were run, and those of them outside of the model's grid."""
        with self._lock:
            self._rows[model] += rows
            self._outside[model] += outside

    def collect(self) -> Iterator[Metric]:
        """List what Prometheus reads."""
        calls = CounterMetricFamily(
            "kanserve_calls",
            "Calls and messages of streams that have ended, by method and gRPC status code; "
            "those refused before they were read have the method `refused`.",
            labels=["method", "code"],
        )
        rows = CounterMetricFamily("kanserve_rows", "Rows that were run.", labels=["model"])
        outside = CounterMetricFamily(
            "kanserve_out_of_grid_rows",
            "Those among them with a feature outside of the grid that the model was trained on, "
            "where its splines are zero.",
            labels=["model"],
        )
        with self._lock:
            for labels, count in self._calls.items():
                calls.add_metric(labels, count)
            for family, counts in ((rows, self._rows), (outside, self._outside)):
                for model, count in counts.items():
                    family.add_metric([model], count)
        yield from (calls, rows, outside)


class ModelCollector(Collector):
    """Describes the models as they are when it is asked.

    Args:
        repository: What is served.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

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
        for name, versions in self._repository.models.items():
            for number, version in versions.items():
                states.add_metric([name, str(number), version.state, version.reason], 1)
                if version.model is not None:
                    fused = version.model.engine.fused_layers
                    standard = len(version.model.manifest.layers) - fused
                    layers.add_metric([name, str(number), "fused"], fused)
                    layers.add_metric([name, str(number), "standard"], standard)
                    for provider, count in version.model.engine.placement.items():
                        nodes.add_metric([name, str(number), provider], count)
        yield from (layers, nodes, states)
