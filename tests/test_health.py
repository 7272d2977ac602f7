"""Watchers of the health service that do what they should not; the rest is tested on servers."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2 as pb

from serving.health import LIVE, Health

WAIT_S = 30.0  # for what happens at once unless something is wrong
SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING


class Watch:
    """A client's watch: what gRPC calls and is called by.

    Args:
        health: Whose status.
        on_send: Called in the middle of sending.
        service: What is watched.
    """

    def __init__(
        self, health: Health, on_send: Callable[["Watch"], object], service: str = ""
    ) -> None:
        self._on_send = on_send
        self._seen: list[Any] = []
        self._changed = threading.Condition()
        health.watch(service, self._send, self.add_callback)

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.go_away = callback
        return True

    def _send(self, response: pb.HealthCheckResponse | None) -> None:
        with self._changed:
            self._seen.append(response and response.status)
            self._changed.notify_all()
        self._on_send(self)

    def await_seen(self, *statuses: Any) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._seen == list(statuses), WAIT_S), self._seen


@pytest.fixture
def health() -> Iterator[Health]:
    service = Health([""])
    yield service
    service.shutdown()


def test_who_goes_away_while_it_is_told_holds_nothing_up(health: Health) -> None:
    """gRPC's one thread must get through `go_away` before it can end what is being sent."""
    ended = threading.Semaphore(0)

    def go_away(watch: Watch) -> None:
        grpcs_own = threading.Thread(target=watch.go_away)
        grpcs_own.start()
        grpcs_own.join(WAIT_S)
        if not grpcs_own.is_alive():
            ended.release()

    leaver = Watch(health, go_away)
    assert ended.acquire(timeout=WAIT_S)
    stayer = Watch(health, lambda _: None)
    stayer.await_seen(NOT_SERVING)
    health.set(True)
    stayer.await_seen(NOT_SERVING, SERVING)
    leaver.await_seen(NOT_SERVING)


def test_who_does_not_read_holds_nobody_up(health: Health) -> None:
    reads = threading.Event()
    try:
        stuck = [Watch(health, lambda _: reads.wait(WAIT_S)) for _ in range(20)]
        reader = Watch(health, lambda _: None)
        reader.await_seen(NOT_SERVING)
        seen = [NOT_SERVING]
        for ready in (True, False, True):
            health.set(ready)
            seen.append(SERVING if ready else NOT_SERVING)
            reader.await_seen(*seen)
    finally:
        reads.set()
    for watch in stuck:  # what changed meanwhile is told once, as it is in the end
        watch.await_seen(NOT_SERVING, SERVING)


def test_the_end_is_told_to_all_watchers(health: Health) -> None:
    watches = [Watch(health, lambda _: None) for _ in range(3)]
    for watch in watches:
        watch.await_seen(NOT_SERVING)
    health.close()
    for watch in watches:
        watch.await_seen(NOT_SERVING, None)


def test_a_live_process_stays_so_while_readiness_comes_and_goes(health: Health) -> None:
    ready, live = (Watch(health, lambda _: None, name) for name in ("", LIVE))
    seen = [NOT_SERVING]
    for is_ready in (True, False):
        ready.await_seen(*seen)
        health.set(is_ready)
        seen.append(SERVING if is_ready else NOT_SERVING)
    ready.await_seen(*seen)
    live.await_seen(SERVING)
    health.close()
    live.await_seen(SERVING, None)
