"""`make test-chaos`, less memory than clients ask for: they are refused, or servers start again.

Each server has a cgroup of its own, as a container has. Whatever happens, no answer may be wrong.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.chaos.conftest import Record
from tests.chaos.load import Question
from tests.chaos.replicas import Replica
from tests.chaos.scenes import WELL_S, under_load
from tests.chaos.ways import CLIENT
from tests.conftest import STATE_DICTS
from tests.servers import await_true
from tests.wire import raw_request

pytestmark = pytest.mark.chaos

UNIFORM = STATE_DICTS[0]
MEMORY_BYTES = 300 * 2**20
LARGE_BYTES = 48 * 2**20
GREEDY = 6  # as many large messages at a time


@pytest.fixture
def limits() -> Iterator[list[list[str]]]:
    """For each of three servers, a command that runs another one with little memory."""
    first = Path("/sys/fs/cgroup/memory")  # of cgroup 1
    root, file = (
        (first, "memory.limit_in_bytes")
        if first.is_dir()
        else (Path("/sys/fs/cgroup"), "memory.max")
    )
    groups = [root / f"kanserve-{os.getpid()}-{i}" for i in range(3)]
    with ExitStack() as stack:
        try:
            for group in groups:
                group.mkdir()
                stack.callback(_remove, group)
                (group / file).write_text(str(MEMORY_BYTES))
        except OSError as error:
            pytest.skip(f"memory cannot be limited here (a cgroup needs root): {error}")
        yield [
            ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"] for group in groups
        ]


def _remove(group: Path) -> None:
    """Remove a group; its last process may be on its way out."""

    def gone() -> bool:
        try:
            group.rmdir()
        except OSError:
            return False
        return True

    await_true(gone)


@contextmanager
def greedy(servers: Sequence[Replica]) -> Iterator[Counter[str]]:
    """Clients that send large messages all the time and never try again; how they ended."""
    codes: Counter[str] = Counter()
    stop = threading.Event()
    message = raw_request(UNIFORM.x, id="x" * LARGE_BYTES)

    def ask(address: str) -> None:
        options = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(address, options) as channel:
            stub = GRPCInferenceServiceStub(channel)
            while not stop.wait(0.05):
                try:
                    codes["OK" if stub.ModelInfer(message, timeout=20).id else "WRONG"] += 1
                except grpc.RpcError as error:
                    codes[error.code().name] += 1

    threads = [
        threading.Thread(target=ask, args=(servers[i % len(servers)].address,))
        for i in range(GREEDY)
    ]
    for thread in threads:
        thread.start()
    try:
        yield codes
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_messages_that_there_is_no_memory_for_are_refused(
    repository: Path,
    questions: list[Question],
    limits: list[list[str]],
    unnoticed: Record,
    tmp_path: Path,
) -> None:
    """With a limit for messages that fits to the memory."""
    flags = ("--max-message-bytes", str(2**22))
    with under_load(CLIENT, tmp_path, [repository] * 3, questions, *flags, limits=limits) as (
        servers,
        running,
    ):
        running.fault()
        with greedy(servers) as codes:
            await_true(lambda: codes.total() >= 5 * GREEDY)
        running.go_on(WELL_S)
        assert set(codes) == {"RESOURCE_EXHAUSTED"}
        assert all(server.process and server.process.poll() is None for server in servers)
    unnoticed("memory, messages limited", CLIENT.name, running)


def test_a_server_that_is_killed_for_its_memory_starts_again(
    repository: Path,
    questions: list[Question],
    limits: list[list[str]],
    record: Record,
    tmp_path: Path,
) -> None:
    """With more messages let in than there is memory for: the default, in a small container."""
    with under_load(CLIENT, tmp_path, [repository] * 3, questions, limits=limits) as (
        servers,
        running,
    ):
        running.fault()
        with greedy(servers):
            await_true(lambda: revive(servers) > 0)
        await_true(lambda: revive(servers) == 0 and all(map(answers, servers)))
    tally = record("memory, killed by the kernel", CLIENT.name, running)
    assert tally.failed == {}, running.messages


def revive(servers: Sequence[Replica]) -> int:
    """Start those again that were killed, as a container's engine does; tell how many."""
    ended = [s for s in servers if s.process is not None and s.process.poll() is not None]
    for server in ended:
        assert server.process is not None
        assert server.process.returncode == -signal.SIGKILL  # the kernel's way
        server.start()
    return len(ended)


def answers(server: Replica) -> bool:
    with grpc.insecure_channel(server.address) as channel:
        try:
            GRPCInferenceServiceStub(channel).ModelInfer(raw_request(UNIFORM.x), timeout=5)
        except grpc.RpcError:
            return False
        return True
