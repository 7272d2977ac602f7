"""What is counted for Prometheus. This module knows models and their engines, not gRPC."""

from collections.abc import Iterator
from functools import cache

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.repository import Repository


class Counters:
    """What is counted as it happens.

    Args:
        registry: Where Prometheus finds it.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "kanserve_calls",
            "Calls and messages of streams that have ended, by method and gRPC status code; "
            "those refused before they were read have the method `refused`.",
            ["method", "code"],
            registry=registry,
        )
        self._rows = Counter(
            "kanserve_rows", "Rows that were answered.", ["model"], registry=registry
        )
        self._outside = Counter(
            "kanserve_out_of_grid_rows",
            "Those among them with a feature outside of the grid that the model was trained on, "
            "where its splines are zero.",
            ["model"],
            registry=registry,
        )

        # Finding a counter by its labels takes as long as counting.
        self._call = cache(self._calls.labels)
        self._row = cache(self._rows.labels)
        self._outside_row = cache(self._outside.labels)

    def count_call(self, method: str, code: str) -> None:
        """Count a call by how it ended."""
        self._call(method, code).inc()

    def count_rows(self, model: str, rows: int, outside: int) -> None:
        """Count the rows of an answer, and those of them outside of the model's grid."""
        self._row(model).inc(rows)
        self._outside_row(model).inc(outside)


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
