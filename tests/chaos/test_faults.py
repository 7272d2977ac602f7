"""`make test-chaos`, what happens to servers and connections: each fault, over each way.

A row of the table for each. None may ever see a wrong answer, nor here a request that fails.
"""

import math
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.conftest import Record
from tests.chaos.load import Load, Question
from tests.chaos.proxy import proxied
from tests.chaos.replicas import Replica, replicas
from tests.chaos.scenes import WELL_S, asked, under_load
from tests.chaos.ways import Way, every_way

pytestmark = pytest.mark.chaos


def restart_one_after_the_other(servers: Sequence[Replica], running: Load) -> None:
    for server in servers:
        running.fault()
        server.restart()
        running.go_on(WELL_S)


def kill(servers: Sequence[Replica], running: Load) -> None:
    running.fault()
    servers[0].kill()
    running.go_on(WELL_S)
    servers[0].start()


def freeze(servers: Sequence[Replica], running: Load) -> None:
    running.fault()
    servers[0].send(signal.SIGSTOP)
    running.go_on(4.0)
    servers[0].send(signal.SIGCONT)


@dataclass(frozen=True)
class Fault:
    """What happens to processes.

    Args:
        name: In the table.
        happens: Does it.
        recovered_s: Within which things must be well again, where that is the point.
    """

    name: str
    happens: Callable[[Sequence[Replica], Load], None]
    recovered_s: float = math.inf


FAULTS = (
    Fault("SIGTERM, one after the other", restart_one_after_the_other),
    Fault("SIGKILL", kill, 2.0),
    Fault("SIGSTOP for 4 s", freeze),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("way", every_way())
def test_no_client_sees_what_happens_to_a_server(
    way: Way,
    fault: Fault,
    repository: Path,
    questions: list[Question],
    unnoticed: Record,
    tmp_path: Path,
) -> None:
    with under_load(way, tmp_path, [repository] * 3, questions) as (servers, running):
        fault.happens(servers, running)
    tally = unnoticed(fault.name, way.name, running)
    assert tally.recovered_s < fault.recovered_s


@pytest.mark.parametrize("way", every_way())
def test_no_client_sees_that_connections_are_slow_and_cut(
    way: Way, repository: Path, questions: list[Question], unnoticed: Record, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        servers = stack.enter_context(replicas(tmp_path, [repository] * 3))
        proxies = [stack.enter_context(proxied(server.port)) for server in servers]
        backends = [proxy.address for proxy in proxies]
        running = stack.enter_context(asked(way, tmp_path, backends, questions))
        for proxy in proxies:
            running.fault()
            proxy.delay_s = 0.05
            running.go_on(0.5)
            proxy.cut()
            running.go_on(WELL_S)
            proxy.delay_s = 0.0
    unnoticed("50 ms of delay, connections cut", way.name, running)
