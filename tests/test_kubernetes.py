"""The manifests for Kubernetes and KServe: what the API takes, and what the server understands.

There is no control plane here. What stands in for it: Kubernetes' own schemas, Kustomize, and the
server itself, which reads the settings and answers the probes.
"""

import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import kubernetes_validate
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.configuration import PREFIX, read_settings
from serving.server import Server
from serving.settings import Settings
from tests.conftest import ROOT, STATE_DICTS
from tests.processes import serving
from tests.servers import WAIT_S, budget_fits
from tests.wire import raw_request

KUBERNETES, KSERVE = ROOT / "deploy" / "kubernetes", ROOT / "deploy" / "kserve"
OLDEST, NEWEST = "1.27", "1.37"  # of Kubernetes: since when probes may be gRPC, and today
MIB = 2**20
CLIENTS_LIMIT = 4 * MIB  # of answers, in every client of gRPC
OURS = {"app.kubernetes.io/name": "kanserve"}
BY_HAND = {"prometheus-adapter.yaml", "prometheusrule.yaml", "servicemonitor.yaml"}

Manifest = dict[str, Any]


def read(path: Path) -> Manifest:
    found: Manifest = yaml.safe_load(path.read_text())
    return found


def resources(folder: Path) -> list[Manifest]:
    listed = read(folder / "kustomization.yaml")["resources"]
    return [read(folder / name) for name in listed]


def own(name: str) -> Manifest:
    return read(KUBERNETES / f"{name}.yaml")


@pytest.fixture
def deployment() -> Manifest:
    return own("deployment")


@pytest.fixture
def container(deployment: Manifest) -> Manifest:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.fixture
def runtime() -> Manifest:
    (found,) = read(KSERVE / "clusterservingruntime.yaml")["spec"]["containers"]
    return dict(found)


def environment(container: Manifest) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container.get("env", [])}


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without settings of the machine's own."""
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("manifest", resources(KUBERNETES), ids=lambda m: m["kind"])
def test_kubernetes_takes_every_manifest(manifest: Manifest, version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_kubernetes_takes_the_pods_of_kserves_runtime() -> None:
    spec = read(KSERVE / "clusterservingruntime.yaml")["spec"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "spec": {key: spec[key] for key in ("containers", "volumes")},
    }
    kubernetes_validate.validate(pod, NEWEST, strict=True)


@pytest.mark.parametrize("folder", [KUBERNETES, KSERVE], ids=lambda folder: folder.name)
def test_kustomize_gives_every_manifest_as_it_is(folder: Path) -> None:
    programs = {"kustomize": ["build"], "kubectl": ["kustomize"]}
    found = next((name for name in programs if shutil.which(name)), None)
    if found is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([found, *programs[found], folder], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

    def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
        return {(m["kind"], m["metadata"]["name"]): m for m in manifests}

    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(resources(folder))


def test_no_manifest_is_forgotten() -> None:
    for folder, others in ((KUBERNETES, BY_HAND), (KSERVE, set())):
        listed = read(folder / "kustomization.yaml")["resources"]
        there = {path.name for path in folder.iterdir()} - others - {"kustomization.yaml"}
        assert sorted(there) == sorted(listed)


def test_the_alerts_rule_is_made_from_their_only_copy() -> None:
    text = (KUBERNETES / "kustomization.yaml").read_text()
    (command,) = re.findall(r"\(cat .*\)", text)
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, check=True)
    rule = yaml.safe_load(done.stdout)
    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"] == read(ROOT / "deploy" / "monitoring" / "alerts.yml")


def test_everything_selects_the_pods_of_the_deployment(deployment: Manifest) -> None:
    spec = deployment["spec"]
    assert spec["template"]["metadata"]["labels"] == OURS
    (spread,) = spec["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"] == spec["selector"] == {"matchLabels": OURS}
    assert own("poddisruptionbudget")["spec"]["selector"] == {"matchLabels": OURS}
    assert own("networkpolicy")["spec"]["podSelector"] == {"matchLabels": OURS}
    for name in ("service", "service-headless"):
        assert own(name)["spec"]["selector"] == OURS
        assert own(name)["metadata"]["labels"] == OURS  # which the ServiceMonitor selects
    assert own("servicemonitor")["spec"]["selector"] == {"matchLabels": OURS}
    target = own("horizontalpodautoscaler")["spec"]["scaleTargetRef"]
    kind = (deployment["apiVersion"], deployment["kind"], deployment["metadata"]["name"])
    assert tuple(target.values()) == kind
    assert "replicas" not in spec  # applied again, it would undo what the autoscaler has chosen
    (volume, _) = spec["template"]["spec"]["volumes"]
    claim = own("persistentvolumeclaim")["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim


def test_ports_are_those_of_the_server_under_one_name_everywhere(
    container: Manifest, no_settings: pytest.MonkeyPatch
) -> None:
    settings = read_settings(Settings, ["--model-repository", "models"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": settings.grpc_port, "metrics": settings.metrics_port}
    assert {c["port"] for c in _probes(container).values()} == {settings.grpc_port}
    for service, names in (("service", {"grpc", "metrics"}), ("service-headless", {"grpc"})):
        found = own(service)["spec"]["ports"]
        assert {port["name"]: port["port"] for port in found} == {n: ports[n] for n in names}
        assert all(port["targetPort"] == port["name"] for port in found)
    rules = own("networkpolicy")["spec"]["ingress"]
    assert [p["port"] for rule in rules for p in rule["ports"]] == ["grpc", "metrics"]
    (endpoint,) = own("servicemonitor")["spec"]["endpoints"]
    assert endpoint["port"] == "metrics"


def test_the_server_understands_the_settings_of_the_deployment(
    deployment: Manifest, container: Manifest, no_settings: pytest.MonkeyPatch
) -> None:
    variables = environment(container)
    for name, value in variables.items():
        assert name.removeprefix(PREFIX).lower() in Settings.model_fields  # others go unread
        no_settings.setenv(name, value)
    settings = read_settings(Settings, [])
    _fits(settings, container)
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts["models"] == {
        "name": "models",
        "mountPath": str(settings.model_repository),
        "readOnly": True,
    }
    assert settings.model_control == "poll"  # what is there is not known to the Deployment
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > settings.drain_s + settings.grace_s
    assert settings.drain_s >= 5  # endpoints take seconds to reach every node
    assert settings.max_connection_age_s is not None


def test_the_server_understands_the_arguments_of_kserves_runtime(
    runtime: Manifest, no_settings: pytest.MonkeyPatch
) -> None:
    settings = read_settings(Settings, runtime["args"])
    _fits(settings, runtime)
    assert str(settings.model_repository) == "/mnt/models"  # where KServe puts them
    (port,) = runtime["ports"]  # Knative takes one
    assert (port["name"], port["containerPort"]) == ("h2c", settings.grpc_port)
    annotations = read(KSERVE / "clusterservingruntime.yaml")["spec"]["annotations"]
    assert annotations["prometheus.kserve.io/port"] == str(settings.metrics_port)
    model = read(KSERVE / "inferenceservice.yaml")["spec"]["predictor"]["model"]
    spec = read(KSERVE / "clusterservingruntime.yaml")["spec"]
    assert model["protocolVersion"] in spec["protocolVersions"]
    assert model["modelFormat"]["name"] in {f["name"] for f in spec["supportedModelFormats"]}
    assert model["runtime"] == read(KSERVE / "clusterservingruntime.yaml")["metadata"]["name"]


def _fits(settings: Settings, container: Manifest) -> None:
    assert settings.host == "0.0.0.0"
    # Without a limit the server sees every CPU of the node.
    assert container["resources"]["requests"]["cpu"] == str(settings.engine_slots)
    assert "cpu" not in container["resources"]["limits"]
    # A message is held several times while it is read: six of 48 MiB have ended a server of 300 MB.
    memory = _bytes(container["resources"]["limits"]["memory"])
    assert settings.max_message_bytes == CLIENTS_LIMIT
    assert settings.max_queue_bytes <= memory / 8
    assert settings.max_inflight_bytes is None
    assert budget_fits(settings, memory)


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": MIB, "Gi": 1024 * MIB}[quantity[-2:]]


def _probes(container: Manifest) -> dict[str, Manifest]:
    return {name: probe["grpc"] for name, probe in container.items() if name.endswith("Probe")}


def test_pods_may_do_nothing_but_serve(
    deployment: Manifest, container: Manifest, runtime: Manifest
) -> None:
    pod = deployment["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    ours = pod["securityContext"] | container["securityContext"]
    for context in (ours, runtime["securityContext"]):
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_copies_of_weights_fit_and_no_pod_fills_the_disk_of_its_node(
    deployment: Manifest, container: Manifest, runtime: Manifest, no_settings: pytest.MonkeyPatch
) -> None:
    """A signed version has its copy; a version that is replaced keeps its own meanwhile."""
    for name, value in environment(container).items():
        no_settings.setenv(name, value)
    of_deployment = read_settings(Settings, [])
    for name in environment(container):
        no_settings.delenv(name)
    pods = (
        (deployment["spec"]["template"]["spec"], of_deployment),
        (
            read(KSERVE / "clusterservingruntime.yaml")["spec"],
            read_settings(Settings, runtime["args"]),
        ),
    )
    for pod, settings in pods:
        assert settings.version_policy == "latest:1"
        largest = settings.max_model_bytes * (1 + 1)
        empty = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
        assert empty
        for volume in empty:
            assert largest < _bytes(volume["sizeLimit"]) <= 1.25 * largest


def test_probes_ask_for_what_the_server_answers(
    container: Manifest, runtime: Manifest, repository: Path
) -> None:
    flags = ("--model-repository", repository, "--host", "127.0.0.1")
    with (
        serving(*flags, environment=environment(container)) as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        check = health_pb2_grpc.HealthStub(channel).Check
        probes = _probes(container)
        assert set(probes) == {"startupProbe", "readinessProbe", "livenessProbe"}
        assert runtime["startupProbe"] == container["startupProbe"]  # as long to load in
        for probe in (*probes.values(), *_probes(runtime).values()):
            request = health_pb2.HealthCheckRequest(service=probe["service"])
            found = check(request, timeout=WAIT_S)
            assert found.status == health_pb2.HealthCheckResponse.SERVING
        assert probes["livenessProbe"]["service"] == "live"  # or one that drains would be killed
        assert probes["readinessProbe"]["service"] == ""


def test_the_autoscaler_goes_by_a_metric_that_there_is(
    server: Server, stub: GRPCInferenceServiceStub
) -> None:
    golden = STATE_DICTS[0]
    stub.ModelInfer(raw_request(golden.x, golden.name), timeout=WAIT_S)
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as response:
        metrics = response.read().decode()
    (rule,) = read(KUBERNETES / "prometheus-adapter.yaml")["rules"]["custom"]
    series, _, _ = rule["seriesQuery"].partition("{")
    assert f"\n{series}{{" in metrics
    first, _ = own("horizontalpodautoscaler")["spec"]["metrics"]
    assert first["pods"]["metric"]["name"] == rule["name"]["as"]
