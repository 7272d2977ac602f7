"""Where faults happen: servers, a way to them, and clients that ask all the time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from serving.client import Tls
from tests.chaos.load import Load, Question, load
from tests.chaos.replicas import Replica, replicas
from tests.chaos.ways import Way

WELL_S = 1.5
"""Before the first fault, between faults and after the last one: for what goes wrong late."""


@contextmanager
def under_load(
    way: Way,
    folder: Path,
    repositories: Sequence[Path],
    questions: Sequence[Question],
    *flags: str | Path,
    environment: Mapping[str, str] | None = None,
    limits: Sequence[Sequence[str]] = ((), (), ()),
    tls: Tls | None = None,
) -> Iterator[tuple[list[Replica], Load]]:
    """Three servers behind a way, asked all the time, until the end of the block.

    Args:
        way: Between clients and servers.
        folder: For logs and configurations.
        repositories: Of each server.
        questions: What is asked.
        flags: Of `python -m serving`.
        environment: Of the servers, in addition to this process's.
        limits: Of each server; see `Replica`.
        tls: How clients recognise servers.
    """
    with (
        replicas(folder, repositories, *flags, environment=environment, limits=limits) as servers,
        asked(way, folder, [server.address for server in servers], questions, tls=tls) as running,
    ):
        yield servers, running


@contextmanager
def asked(
    way: Way,
    folder: Path,
    backends: Sequence[str],
    questions: Sequence[Question],
    *,
    tls: Tls | None = None,
) -> Iterator[Load]:
    """A way that is asked all the time, until the end of the block.

    Args:
        way: Between clients and servers.
        folder: For its configuration and log.
        backends: Where servers listen, or what stands before them.
        questions: What is asked.
        tls: How clients recognise servers.
    """
    with (
        way.open(backends, folder) as addresses,
        load(addresses, questions, tls=tls) as running,
    ):
        running.go_on(WELL_S)
        yield running
        running.go_on(WELL_S)
