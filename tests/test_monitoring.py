"""A real Prometheus scrapes a real server; alerts, and every query of the dashboard, are tried."""

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.conftest import ROOT, STATE_DICTS
from tests.ports import free_port
from tests.processes import serving
from tests.servers import WAIT_S, await_true
from tests.wire import raw_request

MONITORING = ROOT / "deploy" / "monitoring"
UNIFORM = STATE_DICTS[0]
REFUSED = 'sum(kanserve_refusals_total{reason="invalid"})'

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool are not installed (Debian's package `prometheus`)",
)


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that scrapes a server every second."""

    address: str

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The samples that a query gives now."""
        asked = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"http://{self.address}/api/v1/query?{asked}") as response:
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return found

    def value(self, query: str) -> float:
        samples = self.ask(query)
        return float(samples[0]["value"][1]) if samples else 0.0


@pytest.fixture(scope="module")
def prometheus(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has scraped a server of two workers, whose clients did this and that."""
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        serving("--model-repository", repository, "--workers", "2") as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        stub = GRPCInferenceServiceStub(channel)
        _use(stub)
        port = free_port()
        metrics = process.events[-1]["metrics"]
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            f"rule_files: ['{MONITORING}/alerts.yml']\n"
            "scrape_configs: [{job_name: kanserve, static_configs: "
            f"[{{targets: ['{metrics}']}}]}}]\n"
        )
        command = [
            "prometheus", f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as popen:
            try:
                found = Prometheus(f"127.0.0.1:{port}")
                await_true(lambda: _answers(found))
                _use(stub)  # between two scrapes, so that there are rates
                # A scrape in the midst of it has a part.
                await_true(lambda: found.value("sum(kanserve_request_seconds_count)") >= 40)
                await_true(lambda: found.value(REFUSED) >= 2)
                yield found
            finally:
                popen.kill()


def _use(stub: GRPCInferenceServiceStub) -> None:
    x = np.concatenate([UNIFORM.x[:40], np.full((2, 4), 99, np.float32)])
    for _ in range(20):
        stub.ModelInfer(raw_request(x), timeout=WAIT_S)
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(raw_request(x, "none"), timeout=WAIT_S)


def _answers(prometheus: Prometheus) -> bool:
    with suppress(OSError):
        return prometheus.value("sum(kanserve_rows_total)") > 0
    return False


def test_what_is_scraped_is_what_happened(prometheus: Prometheus) -> None:
    model = f'{{model="{UNIFORM.name}"}}'
    assert prometheus.value("up") == 1
    assert prometheus.value("min(kanserve_ready)") == 1
    assert {s["metric"]["worker"] for s in prometheus.ask("kanserve_ready")} == {"0", "1"}
    assert prometheus.value(f"sum(kanserve_request_seconds_count{model})") == 40
    assert prometheus.value(f"sum(kanserve_request_rows_sum{model})") == 40 * 42
    assert prometheus.value(f"sum(kanserve_out_of_grid_rows_total{model})") >= 80
    assert prometheus.value(REFUSED) == 2


def test_metrics_are_named_as_prometheus_likes(prometheus: Prometheus, repository: Path) -> None:
    (target,) = prometheus.ask("up")
    address = target["metric"]["instance"]
    with urllib.request.urlopen(f"http://{address}/metrics") as response:
        text = response.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stderr.decode()) == (0, "")


def test_the_autoscalers_metric_is_how_many_requests_are_in_a_server(
    prometheus: Prometheus,
) -> None:
    """The client asks for one after the other, so there is never more than one."""
    values = yaml.safe_load((ROOT / "deploy/kubernetes/prometheus-adapter.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    query = rule["metricsQuery"]
    for place, filled in (
        ("Series", rule["seriesQuery"].partition("{")[0]),
        ("LabelMatchers", ""),
        ("GroupBy", "instance"),
    ):
        query = query.replace(f"<<.{place}>>", filled)
    await_true(lambda: 0 < prometheus.value(query) < 1)


def queries() -> list[str]:
    """Every query of the dashboard, with its variables as Grafana fills them in."""
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    found = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    names = ("job", "instance", "model")
    for name in names:
        found = [query.replace(f'"${name}"', '".*"') for query in found]
    return [query.replace("$__rate_interval", "1m") for query in found]


@pytest.mark.parametrize("query", queries())
def test_every_query_of_the_dashboard_finds_something(prometheus: Prometheus, query: str) -> None:
    assert "$" not in query
    await_true(lambda: bool(prometheus.ask(query)))


def test_alerts_are_loaded_and_quiet_about_a_server_that_is_well(prometheus: Prometheus) -> None:
    with urllib.request.urlopen(f"http://{prometheus.address}/api/v1/rules") as response:
        (group,) = json.load(response)["data"]["groups"]
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
    assert len(group["rules"]) == 10
    pages = [r for r in group["rules"] if r["labels"]["severity"] == "page"]
    assert pages
    assert {rule["state"] for rule in pages} == {"inactive"}


@pytest.mark.parametrize(
    "command", [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]]
)
def test_alerts_are_rules_that_fire_for_what_they_are_meant_for(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
