"""`make test-chaos`, what happens around servers: versions, disks, clients, certificates, clocks.

A row of the table for each. None may ever see a wrong answer, nor here a request that fails.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client import Tls
from tests.bundles import publish
from tests.chaos.conftest import Record
from tests.chaos.load import Question
from tests.chaos.replicas import DRAIN_S, Replica
from tests.chaos.scenes import WELL_S, under_load
from tests.chaos.ways import CLIENT, Way, every_way
from tests.conftest import ROOT, STATE_DICTS
from tests.security import Authority
from tests.servers import WAIT_S, await_true
from tests.wire import raw_request

pytestmark = pytest.mark.chaos

UNIFORM = STATE_DICTS[0]
POLL = ("--model-control", "poll", "--poll-s", "0.2")
EXPLICIT = ("--model-control", "explicit", "--load-models", json.dumps([UNIFORM.name]))


@pytest.mark.parametrize("way", every_way())
def test_versions_change_on_one_server_and_every_answer_is_its_versions(
    way: Way,
    own_repository: Path,
    doubled: tuple[Path, Question],
    unnoticed: Record,
    tmp_path: Path,
) -> None:
    bundle, question = doubled
    others = Path(shutil.copytree(own_repository, tmp_path / "others"))
    place = own_repository / UNIFORM.name / "2"
    repositories = [own_repository, others, others]
    with (
        under_load(way, tmp_path, repositories, [question], *EXPLICIT) as (servers, running),
        grpc.insecure_channel(servers[0].address) as channel,
    ):
        stub = GRPCInferenceServiceStub(channel)
        for version in ("2", "1", "2"):
            running.fault()
            if version == "2":
                publish(bundle, place.parent, 2)
            else:
                shutil.rmtree(place)
            asked = pb.RepositoryModelLoadRequest(model_name=UNIFORM.name)
            stub.RepositoryModelLoad(asked, timeout=WAIT_S)
            answer = stub.ModelInfer(raw_request(UNIFORM.x), timeout=WAIT_S)
            assert answer.model_version == version
            running.go_on(WELL_S)
    unnoticed("versions swapped on one server", way.name, running)


def corrupt(folder: Path) -> None:
    """Flip one bit in the middle, where weights are."""
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def truncate(folder: Path) -> None:
    """Leave half of it."""
    os.truncate(folder / "model.onnx", (folder / "model.onnx").stat().st_size // 2)


@pytest.mark.parametrize("damage", [corrupt, truncate], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("way", every_way())
def test_a_damaged_version_is_refused_and_the_old_one_goes_on(
    way: Way,
    damage: Callable[[Path], None],
    own_repository: Path,
    doubled: tuple[Path, Question],
    unnoticed: Record,
    tmp_path: Path,
) -> None:
    bundle, question = doubled
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    damage(damaged)
    repositories = [own_repository] * 3
    with under_load(way, tmp_path, repositories, [question], *POLL) as (servers, running):
        running.fault()
        damaged.rename(own_repository / UNIFORM.name / "2")
        await_true(lambda: all("model_refused" in server.log for server in servers))
    unnoticed(f"a version appears: {damage.__name__}", way.name, running)
    ready = [e["version"] for s in servers for e in s.events if e["event"] == "model_ready"]
    assert set(ready) == {1}


@pytest.mark.parametrize("way", every_way())
def test_a_version_that_is_copied_file_by_file_is_served_when_it_is_whole(
    way: Way,
    own_repository: Path,
    doubled: tuple[Path, Question],
    unnoticed: Record,
    tmp_path: Path,
) -> None:
    """Copied in the worst order, the manifest first, and each file in halves."""
    bundle, question = doubled
    place = own_repository / UNIFORM.name / "2"
    repositories = [own_repository] * 3
    with under_load(way, tmp_path, repositories, [question], *POLL) as (servers, running):
        running.fault()
        place.mkdir()
        for file in sorted(bundle.iterdir(), key=lambda file: file.name != "manifest.json"):
            content = file.read_bytes()
            with (place / file.name).open("wb") as copy:
                copy.write(content[: len(content) // 2])
                copy.flush()
                running.go_on(0.3)
                copy.write(content[len(content) // 2 :])
        await_true(lambda: all(serves_two(server) for server in servers))
    unnoticed("a version appears: half-copied", way.name, running)
    assert all("model_refused" in server.log for server in servers)  # while it was not whole


def serves_two(server: Replica) -> bool:
    with grpc.insecure_channel(server.address) as channel:
        request = pb.ModelReadyRequest(name=UNIFORM.name, version="2")
        try:
            return bool(GRPCInferenceServiceStub(channel).ModelReady(request, timeout=5).ready)
        except grpc.RpcError:  # not known yet
            return False


@pytest.mark.parametrize("way", every_way())
def test_clients_that_do_not_read_hold_nobody_up(
    way: Way, repository: Path, questions: list[Question], unnoticed: Record, tmp_path: Path
) -> None:
    with (
        under_load(way, tmp_path, [repository] * 3, questions) as (_, running),
        ExitStack() as stack,
    ):
        running.fault()
        large = raw_request(np.zeros((4096, 4), np.float32))
        for address in running.addresses:
            channel = stack.enter_context(grpc.insecure_channel(address))
            stub = GRPCInferenceServiceStub(channel)
            for _ in range(3):
                stream = stub.ModelStreamInfer(large for _ in range(500))
                next(stream)  # and no more
                stack.callback(stream.cancel)
        running.go_on(2 * WELL_S)
    unnoticed("streams that are not read", way.name, running)


@pytest.mark.parametrize("way", every_way())
def test_a_client_that_is_killed_leaves_nothing_behind(
    way: Way, repository: Path, questions: list[Question], unnoticed: Record, tmp_path: Path
) -> None:
    with under_load(way, tmp_path, [repository] * 3, questions) as (servers, running):
        running.fault()
        command = [sys.executable, "-m", "serving.client", "bench", "--model", UNIFORM.name]
        command += ["--address", ",".join(running.addresses), "--rate", "300", "--rows", "1024"]
        client = subprocess.Popen(
            [*command, "--seconds", "60", "--in-flight", "16"], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        try:
            rows = "kanserve_rows_total"
            before = sum(server.sample(rows) for server in servers)
            await_true(lambda: sum(s.sample(rows) for s in servers) > before + 20 * 1024)
        finally:
            client.kill()
            client.wait(WAIT_S)
        running.go_on(WELL_S)
        await_true(lambda: all(server.sample("kanserve_queue_rows") == 0 for server in servers))
    unnoticed("a client killed while it asks", way.name, running)


def test_certificates_are_renewed_under_load(
    repository: Path, questions: list[Question], unnoticed: Record, tmp_path: Path
) -> None:
    """Connections live for a second, so that there are always some that meet the new files."""
    authority = Authority.make(tmp_path / "authority")
    flags: list[str | Path] = ["--tls-cert", authority.cert, "--tls-key", authority.key]
    flags += ["--max-connection-age-s", "1"]
    tls = Tls(ca=authority.roots)
    repositories = [repository] * 3
    with under_load(CLIENT, tmp_path, repositories, questions, *flags, tls=tls) as (
        servers,
        running,
    ):
        for _ in range(4):
            running.fault()
            authority.renew()
            running.go_on(WELL_S)
        await_true(lambda: all("files_read_again" in server.log for server in servers))
    unnoticed("certificates renewed", CLIENT.name, running)


@pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler is not installed")
@pytest.mark.parametrize("way", every_way())
def test_clocks_that_jump_change_no_deadline_and_no_drain(
    way: Way, repository: Path, questions: list[Question], unnoticed: Record, tmp_path: Path
) -> None:
    """The servers' wall clocks jump by days, on and back; their monotonic ones do not."""
    offset, library = tmp_path / "offset", tmp_path / "clock.so"
    offset.write_bytes(bytes(8))
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)

    def jump(days: int) -> None:
        with offset.open("r+b") as file:
            file.write((86_400 * days).to_bytes(8, sys.byteorder, signed=True))

    environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(offset)}
    repositories = [repository] * 3
    with under_load(way, tmp_path, repositories, questions, environment=environment) as (
        servers,
        running,
    ):
        for days in (2, -2, 0):
            running.fault()
            jump(days)
            running.go_on(WELL_S)
        running.fault()
        jump(-2)
        servers[0].send(signal.SIGTERM)
        started = time.monotonic()
        jump(2)
        assert servers[0].process is not None
        assert servers[0].process.wait(WAIT_S) == 0
        assert time.monotonic() - started < DRAIN_S + 8  # the grace would end after 10 more
        jumped = {event["time"][:10] for event in servers[0].events}
        assert len(jumped) > 1  # as its own log says
    unnoticed("clocks jump by two days", way.name, running)


@pytest.fixture(params=["8k", "12k", "24k", "44k"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """File systems that are full before each of the files is written: 48k are enough."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted (mount -t tmpfs needs root)")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_an_export_onto_a_full_disk_says_so_in_one_line_and_leaves_nothing(
    small_disk: Path,
) -> None:
    command = [sys.executable, "-m", "export", str(UNIFORM.checkpoint), "--activation", "silu"]
    command += ["--output", str(small_disk / "models")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "No space left on device; make room" in error
    assert "Traceback" not in done.stderr
    assert list(small_disk.iterdir()) == []
