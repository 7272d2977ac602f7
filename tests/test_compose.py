"""deploy/compose.yaml and what it mounts: valid, and in agreement with the server and its image."""

import json
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml

from export.conversion.onnx_graph import LARGEST_INLINE
from serving.settings import Settings
from tests.conftest import ROOT
from tests.servers import budget_fits

DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = {name: one for name, one in SERVICES.items() if name.startswith("kanserve-")}
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def settings_of(service: dict[str, Any]) -> Settings:
    """What the server makes of its environment, with the image's beneath."""
    image = dict(re.findall(r"(KANSERVE_\w+)=(\S+)", DOCKERFILE))
    given = {"KANSERVE_HOST": image["KANSERVE_HOST"],
             "KANSERVE_MODEL_REPOSITORY": image["KANSERVE_MODEL_REPOSITORY"],
             **service["environment"]}  # fmt: skip
    read: dict[str, Any] = {
        key.removeprefix("KANSERVE_").lower(): json.loads(value) if value.startswith("[") else value
        for key, value in given.items()
    }
    return Settings(**read)


def seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text[:-1])


def test_it_is_valid_by_the_schema_of_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_three_servers_all_alike() -> None:
    assert list(SERVERS) == ["kanserve-1", "kanserve-2", "kanserve-3"]
    first, *others = SERVERS.values()
    assert others == [first, first]


def test_servers_have_time_to_drain_and_to_end() -> None:
    for service in SERVERS.values():
        settings = settings_of(service)
        assert seconds(service["stop_grace_period"]) > settings.drain_s + settings.grace_s


def test_what_servers_read_and_hold_fits_into_their_memory() -> None:
    """A message is held several times while it is read."""
    for service in SERVERS.values():
        settings = settings_of(service)
        memory = 2**20 * int(service["mem_limit"].removesuffix("m"))
        assert settings.max_message_bytes == 4 * 2**20  # what clients of gRPC take
        assert settings.max_queue_bytes <= memory / 8
        assert settings.max_inflight_bytes is None
        (size,) = (int(text.partition("size=")[2].rstrip("m")) for text in service["tmpfs"])
        assert budget_fits(settings, memory, beside=size * 2**20)


def test_servers_find_what_is_mounted_and_are_who_the_image_says() -> None:
    for service in SERVERS.values():
        (models,) = service["volumes"]
        assert models["target"] == str(settings_of(service).model_repository)
        assert models["read_only"]
        assert service["user"] == re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)[0]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert not service.get("privileged")
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_from_here_is_here(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        if volume["type"] == "bind" and not volume["source"].startswith("${"):
            assert (DEPLOY / volume["source"]).exists(), volume


def test_the_balancer_knows_every_server_by_its_name_and_port() -> None:
    config = (DEPLOY / "balancers" / "haproxy.cfg").read_text()
    port = settings_of(SERVERS["kanserve-1"]).grpc_port
    named = set(re.findall(r"^\s*server \S+ (\S+:\d+)", config, re.MULTILINE))
    assert named == {f"{name}:{port}" for name in SERVERS}
    (published,) = SERVICES["balancer"]["ports"]
    assert re.search(rf"^\s*bind :{published.rpartition(':')[2]}\b", config, re.MULTILINE)


def test_prometheus_scrapes_every_server_where_its_metrics_are() -> None:
    config = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (group,) = job["static_configs"]
    port = settings_of(SERVERS["kanserve-1"]).metrics_port
    assert group["targets"] == [f"{name}:{port}" for name in SERVERS]
    for one in SERVERS.values():  # a name that is not listed would get 421
        assert {*SERVERS} <= {*settings_of(one).metrics_hosts}
    assert config["rule_files"] == ["alerts.yml"]


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian's `prometheus`)"
)
def test_prometheus_takes_its_configuration_and_finds_its_rules() -> None:
    file = DEPLOY / "monitoring" / "prometheus.yml"
    command = ["promtool", "check", "config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 rules found" in done.stdout


def test_a_server_cannot_fill_the_memory_by_its_files() -> None:
    for one in SERVERS.values():
        (mount,) = one["tmpfs"]
        size = re.fullmatch(r"/tmp:size=(\d+)m", mount)
        assert size
        assert int(size[1]) <= int(one["mem_limit"].removesuffix("m")) / 4


def test_what_servers_write_fits_into_their_folder_for_files() -> None:
    """Copies of the weights of signed models, which only models above a size have."""
    for one in SERVERS.values():
        assert settings_of(one).max_model_bytes <= LARGEST_INLINE


def test_the_balancer_may_have_all_streams_and_connections() -> None:
    for one in SERVERS.values():
        assert settings_of(one).max_peer_share == 1
