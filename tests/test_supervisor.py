"""Workers that hang, die and disagree, seen from the wire, from the log and from the system."""

import json
import os
import resource
import signal
import threading
from pathlib import Path

import grpc
import pytest

from tests.bundles import publish
from tests.conftest import run_module
from tests.processes import serving
from tests.servers import WAIT_S, await_true
from tests.supervised import INJECTED, NAME, has_ended, scraped, states, supervised
from tests.test_workers import code_of


@pytest.fixture
def root(repository: Path, tmp_path: Path) -> Path:
    publish(repository / NAME / "1", tmp_path / "models" / NAME, 1)
    return tmp_path / "models"


def test_a_worker_that_hangs_is_killed_and_replaced(root: Path) -> None:
    with supervised(root, workers=3) as server:
        hung = server.pids[1]
        os.kill(hung, signal.SIGSTOP)
        server.await_event("worker_hung", worker=1)
        await_true(lambda: has_ended(hung))
        os.kill(server.pids[0], signal.SIGKILL)  # a healthy one is replaced meanwhile
        server.await_event("worker_died", worker=0)
        server.await_workers(3)
        assert server.versions() == {"1"}


@pytest.mark.parametrize("signals", [1, 2])
def test_a_worker_that_hangs_does_not_hold_up_the_stop(root: Path, signals: int) -> None:
    timeout = ("--worker-timeout-s", "3600", "--grace-s", "0.5" if signals == 1 else "3600")
    with supervised(root, *timeout) as server:
        os.kill(server.pids[1], signal.SIGSTOP)
        for count in range(signals):
            server.process.popen.send_signal(signal.SIGTERM)
            if count == 0:  # two of them at once are one
                server.await_event("draining")
        assert server.process.popen.wait(WAIT_S) == 0
        assert all(has_ended(pid) for pid in server.pids.values())


def test_scrapes_of_a_worker_that_hangs_end(root: Path) -> None:
    with supervised(root, "--worker-timeout-s", "3600") as server:
        os.kill(server.pids[1], signal.SIGSTOP)
        for _ in range(2):
            assert set(scraped(server.process)["kanserve_ready"]) == {"0"}
        os.kill(server.pids[0], signal.SIGKILL)
        server.await_event("worker_started", count=3)
        server.await_workers(2)


def test_a_worker_that_returns_serves_what_its_siblings_serve(root: Path, repository: Path) -> None:
    with supervised(root) as server:
        publish(repository / NAME / "1", root / NAME, 2)
        os.kill(server.pids[1], signal.SIGKILL)
        server.await_event("worker_started", count=3)
        server.await_workers(2)
        assert server.versions() == {"1"}


def test_a_worker_that_cannot_serve_what_its_siblings_serve_does_not_listen(root: Path) -> None:
    with supervised(root) as server:
        good = (root / NAME / "1" / "model.onnx").read_bytes()
        (root / NAME / "1" / "model.onnx").write_bytes(good[:-1])
        os.kill(server.pids[1], signal.SIGKILL)
        server.await_event("worker_refused", worker=1)
        assert scraped(server.process)["kanserve_workers"] == {"": 1}
        assert server.versions() == {"1"}
        (root / NAME / "1" / "model.onnx").write_bytes(good)
        server.await_workers(2)
        assert server.versions() == {"1"}


def test_workers_decide_anew_when_none_is_left_that_serves(root: Path, repository: Path) -> None:
    publish(repository / NAME / "1", root / NAME, 2)
    with supervised(root) as server:
        assert server.versions() == {"2"}
        (root / NAME / "2" / "golden.npz").write_bytes(b"damaged")
        for pid in server.pids.values():
            os.kill(pid, signal.SIGKILL)
        server.await_event("desired_state_lost")
        await_true(lambda: server.versions() == {"1"})
        server.await_workers(2)


def test_a_worker_that_dies_while_it_loads_returns_with_the_model(
    root: Path, tmp_path: Path
) -> None:
    with supervised(root, "--model-control", "explicit") as server:
        go = tmp_path / "go"
        server.inject({"suffix": "golden.npz", "pid": server.pids[1], "until": str(go)})
        codes: list[grpc.StatusCode] = []
        loading = threading.Thread(target=lambda: codes.append(server.load()))
        loading.start()
        server.await_event("model_ready", worker=0)
        os.kill(server.pids[1], signal.SIGKILL)
        loading.join(WAIT_S)
        assert codes in (
            [grpc.StatusCode.OK],
            [grpc.StatusCode.UNAVAILABLE],
        )  # if it asked that one
        server.await_workers(2)
        await_true(lambda: server.versions() == {"1"})


@pytest.mark.parametrize("error", ["ENOSPC", "ESTALE", "MemoryError"])
def test_what_one_worker_cannot_load_is_undone_in_all_and_can_be_asked_for_again(
    root: Path, error: str
) -> None:
    with supervised(root, "--model-control", "explicit", workers=3) as server:
        server.inject({"suffix": "golden.npz", "pid": server.pids[2], "error": error})
        assert server.load() is grpc.StatusCode.FAILED_PRECONDITION
        assert server.versions() == {"UNAVAILABLE"}
        server.inject()
        assert server.load() is grpc.StatusCode.OK
        assert server.versions() == {"1"}
        assert scraped(server.process)["kanserve_load_failures_total"] == {"0": 0, "1": 0, "2": 1}


@pytest.mark.parametrize("control", ["none", "poll"])
@pytest.mark.parametrize("error", ["EIO", "MemoryError"])
def test_what_fails_for_a_moment_is_loaded_later(root: Path, control: str, error: str) -> None:
    faults = root.parent / "faults.json"
    faults.write_text(json.dumps([{"suffix": "golden.npz", "error": error}]))
    environment = {"PYTHONPATH": INJECTED, "FAULTY_FILES": str(faults)}
    arguments = ("--model-control", control, "--poll-s", "0.1")
    with serving("--model-repository", root, *arguments, environment=environment) as process:
        assert process.until("model_refused")["transient"] if control == "poll" else True
        with grpc.insecure_channel(process.address) as channel:
            assert code_of(channel) is grpc.StatusCode.UNAVAILABLE
            faults.write_text("[]")
            await_true(lambda: code_of(channel) is grpc.StatusCode.OK)


def test_the_system_may_refuse_a_process_for_a_while(root: Path) -> None:
    with supervised(root) as server:
        keeper = server.process.popen.pid
        limits = resource.prlimit(keeper, resource.RLIMIT_NOFILE)
        resource.prlimit(keeper, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(server.pids[1], signal.SIGKILL)
        server.await_event("worker_not_started", count=2, worker=1)
        resource.prlimit(keeper, resource.RLIMIT_NOFILE, limits)
        server.await_workers(2)
        assert server.versions() == {"1"}


@pytest.mark.parametrize("step", ["fork", "exec"])
def test_a_system_without_processes_refuses_the_start(root: Path, step: str) -> None:
    faults = root.parent / "faults.json"
    faults.write_text(json.dumps([{"suffix": step, "error": "EAGAIN"}]))
    done = run_module(
        *("serving", "--model-repository", root, "--workers", "2"),
        *("--grpc-port", "0", "--metrics-port", "0"),
        environment={"PYTHONPATH": INJECTED, "FAULTY_FILES": str(faults)},
    )
    assert done.returncode == 1
    refused = json.loads(done.stderr.splitlines()[-1])
    assert refused["event"] == "refused_to_start"
    assert "no process can be started: Resource temporarily unavailable" in refused["reason"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_does_not_wait_for_a_load_that_polling_has_begun(
    root: Path, repository: Path, tmp_path: Path, workers: int
) -> None:
    poll = ("--model-control", "poll", "--poll-s", "0.1")
    with supervised(root, *poll, workers=workers) as server:
        server.inject({"suffix": "golden.npz", "until": str(tmp_path / "never")})
        publish(repository / NAME / "1", root / NAME, 2)
        await_true(lambda: states(server.process).get(("2", "LOADING")) == workers)
        server.process.popen.send_signal(signal.SIGTERM)
        assert server.process.popen.wait(WAIT_S) == 0


def test_workers_beyond_the_cpus_are_warned_of(root: Path) -> None:
    one_cpu = ("taskset", "--cpu-list", str(min(os.sched_getaffinity(0))))
    with serving("--model-repository", root, "--workers", "2", prefix=one_cpu) as process:
        (warning,) = (e for e in process.events if e["event"] == "workers_beyond_cpus")
        assert (warning["workers"], warning["cpus"]) == (2, 1)
