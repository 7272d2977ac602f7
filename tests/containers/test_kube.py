"""The Deployment for Kubernetes, as far as podman plays it: two replicas that answer and end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from serving.client import KanClient
from tests.bundles import CLOSE
from tests.conftest import ROOT
from tests.containers.asking import Images, await_ready
from tests.containers.engine import FOLDER, Container, run

pytestmark = pytest.mark.container

DEPLOYMENT = ROOT / "deploy" / "kubernetes" / "deployment.yaml"
REPLICAS = 2


def playable(deployment: dict[str, Any], image: str, models: Path) -> dict[str, Any]:
    """Leave out what podman 4.3 does not know, and give it the models from this machine."""
    deployment["spec"]["replicas"] = REPLICAS  # an autoscaler would choose
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container["image"] = image
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        container.pop(probe, None)  # podman has systemd run them
    container.pop("ports")  # podman would publish them on this machine, for both replicas
    pod.pop("topologySpreadConstraints", None)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    pod["volumes"] = [
        {"name": volume["name"], "hostPath": {"path": str(models), "type": "Directory"}}
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    known = {volume["name"] for volume in pod["volumes"]}
    assert known < mounted
    container["volumeMounts"] = [m for m in container["volumeMounts"] if m["name"] in known]
    return deployment


@pytest.fixture
def replicas(cpu_image: str, digits: Path) -> Iterator[list[Container]]:
    file = FOLDER / "deployment.yaml"
    deployment = yaml.safe_load(DEPLOYMENT.read_text())
    file.write_text(yaml.safe_dump(playable(deployment, cpu_image, digits / "models")))
    run("podman", "play", "kube", file)
    try:
        listed = run("podman", "ps", "--filter", "label=app.kubernetes.io/name=kanserve",
                     "--filter", f"ancestor={cpu_image}", "--format", "{{.ID}}")  # fmt: skip
        yield [Container(one) for one in listed.splitlines()]
    finally:
        run("podman", "play", "kube", "--down", file)


def test_two_replicas_answer_and_end_with_0(
    replicas: list[Container], images_of_digits: Images
) -> None:
    assert len(replicas) == REPLICAS
    addresses = [f"{replica.ip}:8001" for replica in replicas]
    assert len(set(addresses)) == REPLICAS
    for address in addresses:
        await_ready(address)
        with KanClient(address) as client:
            y = client.infer("digits", images_of_digits.x)
        np.testing.assert_allclose(y, images_of_digits.y, **CLOSE)
    for replica in replicas:
        assert replica.status("Uid").split() == ["10001"] * 4
        assert int(replica.status("CapEff"), 16) == 0
        assert replica.status("NoNewPrivs") == "1"
        replica.execute("sh", "-c", ": > /x", code=2)
        replica.stop(timeout_s=30)
        assert replica.inspect("{{.State.ExitCode}}") == "0"
