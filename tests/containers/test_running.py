"""The server in its container: answers, limits, probes and ends, seen from outside."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from serving.client import KanClient
from tests.bundles import CLOSE
from tests.containers.asking import Images, Load, await_ready, is_ready
from tests.containers.engine import Container, running
from tests.servers import await_true

pytestmark = pytest.mark.container

READY_S = 3.0  # from `podman run` to the first SERVING
IDLE_BYTES = 150e6
DRAIN_S, GRACE_S = 1.0, 5.0


@pytest.fixture(scope="module")
def container(cpu_image: str, digits: Path) -> Iterator[Container]:
    with running(cpu_image, digits / "models") as container:
        await_ready(container.address)
        yield container


def test_it_answers_from_outside_as_eager_pytorch_does(
    container: Container, images_of_digits: Images
) -> None:
    with KanClient(container.address) as client:
        y = client.infer("digits", images_of_digits.x)
    np.testing.assert_allclose(y, images_of_digits.y, **CLOSE)
    assert (y.argmax(axis=1) == images_of_digits.labels).mean() > 0.95


def test_its_models_run_fused(container: Container) -> None:
    (ready,) = [event for event in container.events() if event["event"] == "model_ready"]
    assert ready["fused_layers"] > 0


def test_it_may_nothing_that_it_does_not_need(container: Container) -> None:
    assert container.status("Uid").split() == ["10001"] * 4
    assert container.status("Gid").split() == ["10001"] * 4
    assert {int(container.status(f"Cap{name}"), 16) for name in ("Prm", "Eff", "Bnd", "Amb")} == {0}
    assert container.status("NoNewPrivs") == "1"
    assert container.inspect("{{.HostConfig.ReadonlyRootfs}}") == "true"
    for place in ("/", "/tmp", "/models", "/opt/kanserve"):
        container.execute("sh", "-c", f": > {place}/x", code=2)


def test_it_holds_less_than_150_mb_when_idle(container: Container) -> None:
    kilobytes = int(container.status("VmRSS").removesuffix("kB"))
    print(f"the idle server holds {kilobytes * 1024 / 1e6:.0f} MB")
    assert kilobytes * 1024 < IDLE_BYTES


def test_its_health_check_says_what_it_is(container: Container) -> None:
    container.look()
    assert container.execute("kan-client", "health") == "127.0.0.1:8001 SERVING"


def test_it_is_ready_within_3_s(cpu_image: str, digits: Path) -> None:
    started = time.monotonic()
    with running(cpu_image, digits / "models") as container:
        await_ready(container.address)
        took_s = time.monotonic() - started
    print(f"from `podman run` to ready in {took_s:.2f} s")
    assert took_s < READY_S


def test_its_health_check_follows_its_settings(cpu_image: str, digits: Path) -> None:
    settings = {"KANSERVE_GRPC_PORT": "9001"}
    with running(cpu_image, digits / "models", settings=settings) as container:
        await_true(lambda: "listening" in [event["event"] for event in container.events()])
        container.look()


def test_sigterm_ends_it_with_0_and_health_goes_first(cpu_image: str, digits: Path) -> None:
    settings = {"KANSERVE_DRAIN_S": "600", "KANSERVE_GRACE_S": str(GRACE_S)}
    with running(cpu_image, digits / "models", settings=settings) as container:
        await_ready(container.address)
        os.kill(container.pid, signal.SIGTERM)
        await_true(lambda: not is_ready(container.address))
        told = container.execute("kan-client", "health", code=1)
        assert told == "127.0.0.1:8001 NOT_SERVING"
        container.look(code=1)
        container.stop()  # a second one does not wait
        assert container.inspect("{{.State.ExitCode}}") == "0"


def test_stopping_one_after_the_other_under_load_fails_nobody(
    cpu_image: str, digits: Path, images_of_digits: Images
) -> None:
    settings = {"KANSERVE_DRAIN_S": str(DRAIN_S), "KANSERVE_GRACE_S": str(GRACE_S)}
    with ExitStack() as stack:
        containers = [
            stack.enter_context(running(cpu_image, digits / "models", settings=settings))
            for _ in range(3)
        ]
        addresses = [container.address for container in containers]
        for address in addresses:
            await_ready(address)
        with Load(addresses, images_of_digits) as load:
            load.await_more(100)
            for container in containers[:-1]:
                took_s = container.stop()
                print(f"stopped in {took_s:.2f} s after {load.answered} answers")
                assert container.inspect("{{.State.ExitCode}}") == "0"
                assert container.events()[-1]["event"] == "stopped"
                assert took_s < DRAIN_S + GRACE_S
                load.await_more(100)
        assert load.failures == []


def test_process_1_is_the_server_and_leaves_no_child_behind(cpu_image: str, digits: Path) -> None:
    settings = {"KANSERVE_WORKERS": "2"}
    with running(cpu_image, digits / "models", settings=settings) as container:
        await_ready(container.address)
        assert "kan-serve" in Path(f"/proc/{container.pid}/cmdline").read_text()
        worker = next(e["pid"] for e in container.events() if e["event"] == "worker_started")
        container.execute("sh", "-c", f"kill -9 {worker}")
        await_true(lambda: "worker_died" in [event["event"] for event in container.events()])
        await_ready(container.address)
        for _ in range(3):
            container.look()
        states = container.execute(
            "sh", "-c", "for f in /proc/[0-9]*/stat; do cut -d' ' -f3 $f; done"
        )
        assert "Z" not in states.split()
        assert states.split().count("S") >= 3
        container.stop()
        assert container.inspect("{{.State.ExitCode}}") == "0"
