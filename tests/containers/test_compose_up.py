"""deploy/compose.yaml, up: three servers behind HAProxy, scraped by Prometheus.

HAProxy and Prometheus are Debian's, in images under the names that the file asks for.
"""

import json
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.containers import engine
from tests.containers.asking import Images, Load, await_ready
from tests.containers.engine import FOLDER, Container, run
from tests.ports import free_port
from tests.servers import await_true

pytestmark = pytest.mark.container

FILE = ROOT / "deploy" / "compose.yaml"
SERVERS = [f"kanserve-{i}" for i in (1, 2, 3)]
_INSTALL = "apt-get update && apt-get install --yes --no-install-recommends"
STAND_INS = {
    "balancer": f"""\
FROM {engine.PYTHON_IMAGE}
RUN {_INSTALL} haproxy
USER 99:99
CMD ["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]
""",
    "prometheus": f"""\
FROM {engine.PYTHON_IMAGE}
RUN {_INSTALL} prometheus && mkdir -p /prometheus && chown 65534:65534 /prometheus
USER 65534:65534
VOLUME /prometheus
ENTRYPOINT ["prometheus"]
""",
}


@dataclass(frozen=True)
class Project:
    """What is up."""

    port: int
    prometheus_port: int

    def container(self, service: str) -> Container:
        label = f"label=com.docker.compose.service={service}"
        return Container(run("podman", "ps", "--all", "--quiet", "--filter", label))

    def value(self, query: str) -> float:
        """What Prometheus finds; 0 if that is nothing."""
        asked = urllib.parse.urlencode({"query": query})
        url = f"http://127.0.0.1:{self.prometheus_port}/api/v1/query?{asked}"
        with suppress(OSError), urllib.request.urlopen(url, timeout=10) as response:
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
            return float(found[0]["value"][1]) if found else 0.0
        return 0.0


@pytest.fixture
def project(cpu_image: str, base_image: str, digits: Path) -> Iterator[Project]:
    services = yaml.safe_load(FILE.read_text())["services"]
    chosen = {"KANSERVE_IMAGE": cpu_image, "MODELS": str(digits / "models")}
    for name, dockerfile in STAND_INS.items():
        variable, _, image = services[name]["image"].strip("${}").partition(":-")
        chosen[variable] = image
        if not engine.exists(image):
            engine.build_text(image, dockerfile)
    found = Project(free_port(), free_port())
    chosen |= {"PORT": str(found.port), "PROMETHEUS_PORT": str(found.prometheus_port)}
    # podman has systemd look at health, which is not everywhere.
    unwatched = FOLDER / "unwatched.yaml"
    disabled = {"healthcheck": {"disable": True}}
    unwatched.write_text(yaml.safe_dump({"services": dict.fromkeys(SERVERS, disabled)}))
    program = Path(sys.executable).with_name("podman-compose")
    command = list(map(str, (program, "--file", FILE, "--file", unwatched)))

    def compose(*arguments: str) -> None:
        done = subprocess.run(
            [*command, *arguments],
            env=engine.environment() | chosen,
            cwd=FOLDER,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        compose("up", "--detach")
        yield found
    finally:
        compose("down", "--volumes", "--timeout", "0")


def test_clients_are_answered_by_all_while_servers_are_stopped(
    project: Project, images_of_digits: Images
) -> None:
    address = f"127.0.0.1:{project.port}"
    await_ready(address)
    await_true(lambda: project.value("sum(kanserve_ready)") == 3)
    with Load([address], images_of_digits) as load:
        load.await_more(300)
        await_true(lambda: project.value("count(kanserve_rows_total > 0)") == 3)
        stopped = project.container(SERVERS[0])
        stopped.stop()
        assert stopped.inspect("{{.State.ExitCode}}") == "0"
        load.await_more(300)
    assert load.failures == []
    await_true(lambda: project.value("sum(up)") == 2)
    rules = f"http://127.0.0.1:{project.prometheus_port}/api/v1/rules"
    with urllib.request.urlopen(rules) as response:
        (group,) = json.load(response)["data"]["groups"]
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}


def test_a_balancer_that_starts_while_a_server_is_away_finds_it_later(
    project: Project, images_of_digits: Images
) -> None:
    """Another one beside it: podman starts none again whose dependencies are not all there."""
    await_ready(f"127.0.0.1:{project.port}")
    away, balancer = project.container(SERVERS[0]), project.container("balancer")
    away.stop()
    port = free_port()
    config = ROOT / "deploy" / "balancers" / "haproxy.cfg"
    late = run(
        *("podman", "run", "--detach", "--pull=never", "--read-only", "--network"),
        balancer.inspect("{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}"),
        *("--volume", f"{config}:/usr/local/etc/haproxy/haproxy.cfg:ro"),
        *("--publish", f"127.0.0.1:{port}:8001", balancer.inspect("{{.ImageName}}")),
    )
    try:
        with Load([f"127.0.0.1:{port}"], images_of_digits) as load:
            load.await_more(100)
            run("podman", "start", away.id)
            await_true(lambda: project.value("count(kanserve_rows_total > 0)") == 3)
        assert load.failures == []
    finally:
        run("podman", "rm", "--force", "--time", "0", late)


def test_every_service_is_confined_as_the_file_says(project: Project) -> None:
    for service in (*SERVERS, "balancer", "prometheus"):
        container = project.container(service)
        assert container.inspect("{{.HostConfig.ReadonlyRootfs}}") == "true"
        await_true(lambda c=container: int(c.status("CapEff"), 16) == 0)  # type: ignore[misc]
        assert container.status("NoNewPrivs") == "1"
        assert container.status("Uid").split()[0] != "0"
        assert int(container.inspect("{{.HostConfig.Memory}}")) > 0
