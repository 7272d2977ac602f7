"""What watchers of the health service are sent; how it is sent is tested on servers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health_pb2_grpc import HealthStub

from serving.health import LIVE, Health
from tests.servers import WAIT_S, await_true, served

SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING


class Watch:
    """A client's watch, as the service sees it."""

    def __init__(self, health: Health, service: str = "") -> None:
        self.seen: list[Any] = []
        watcher: Any = self
        health.watch(service, watcher)

    def publish(self, content: bytes) -> None:
        self.seen.append(pb.HealthCheckResponse.FromString(content).status)

    def finish(self) -> None:
        self.seen.append(None)

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.go_away = callback
        return True


@pytest.fixture
def health() -> Health:
    return Health([""])


def test_who_has_gone_away_is_sent_nothing(health: Health) -> None:
    leaver, stayer = Watch(health), Watch(health)
    leaver.go_away()
    health.set(True)
    assert leaver.seen == [NOT_SERVING]
    assert stayer.seen == [NOT_SERVING, SERVING]


def test_what_does_not_change_is_sent_once(health: Health) -> None:
    watch = Watch(health)
    for ready in (False, True, True, False):
        health.set(ready)
    assert watch.seen == [NOT_SERVING, SERVING, NOT_SERVING]


def test_all_watches_end(health: Health) -> None:
    watches = [Watch(health) for _ in range(3)]
    health.close()
    assert all(watch.seen == [NOT_SERVING, None] for watch in watches)


def test_an_unknown_service_ends_the_watch(health: Health) -> None:
    assert Watch(health, "none").seen == [pb.HealthCheckResponse.SERVICE_UNKNOWN, None]


def test_a_live_process_stays_so_while_readiness_comes_and_goes(health: Health) -> None:
    ready, live = Watch(health), Watch(health, LIVE)
    for is_ready in (True, False):
        health.set(is_ready)
    health.close()
    assert ready.seen == [NOT_SERVING, SERVING, NOT_SERVING, None]
    assert live.seen == [SERVING, None]


@pytest.mark.usefixtures("threads")
def test_watchers_over_the_network_see_every_state_and_the_end(repository: Path) -> None:
    with served(repository) as (server, _), grpc.insecure_channel(server.address) as channel:
        watch = HealthStub(channel).Watch(pb.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status == SERVING
        server.drain()
        assert next(watch).status == NOT_SERVING
        server.stop(1.0, lambda: False)
        assert list(watch) == []
        assert watch.code() is grpc.StatusCode.OK
        await_true(lambda: not any(map(len, server.rooms.values())))
