"""Several processes on one port, seen from the wire, from the log and from the system."""

import json
import os
import signal
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving import runtime
from serving.runtime import default_workers
from tests.bundles import publish
from tests.conftest import STATE_DICTS, run_module
from tests.processes import Process, serving
from tests.servers import WAIT_S, await_true
from tests.supervised import CONNECTIONS, connections, has_ended, scraped
from tests.wire import raw_output, raw_request

UNIFORM = STATE_DICTS[0]
TWO = ("--workers", "2", "--drain-s", "0")


def code_of(channel: grpc.Channel) -> grpc.StatusCode:
    """Ask for something, and tell how it ended; what is answered is checked."""
    try:
        answer = GRPCInferenceServiceStub(channel).ModelInfer(
            raw_request(UNIFORM.x, UNIFORM.name), timeout=WAIT_S, wait_for_ready=True
        )
    except grpc.RpcError as error:
        return error.code()
    np.testing.assert_allclose(raw_output(answer), UNIFORM.y64, rtol=1e-5, atol=1e-5)
    return grpc.StatusCode.OK


def codes(process: Process) -> set[str]:
    with connections(process) as channels:
        return {code_of(channel).name for channel in channels}


def test_workers_share_the_port_and_the_metrics_tell_of_each(repository: Path) -> None:
    with serving("--model-repository", repository, *TWO) as process:
        assert codes(process) == {"OK"}
        rows: dict[str, float] = {}

        def both_are_told_of() -> bool:  # who is slow to answer is left out of a scrape
            rows.update(scraped(process).get("kanserve_rows_total", {}))
            return set(rows) == {"0", "1"}

        await_true(both_are_told_of)
        assert sum(rows.values()) == CONNECTIONS * len(UNIFORM.x)
        assert all(rows.values())
        process.popen.send_signal(signal.SIGTERM)
        process.until("stopped")
        assert process.popen.wait(WAIT_S) == 0


def test_by_default_there_is_a_worker_for_every_cpu(repository: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    for count in range(1, len(cpus) + 1):
        pinned = ("taskset", "--cpu-list", ",".join(map(str, cpus[:count])))
        environment = {"KANSERVE_WORKERS": ""}
        with serving(
            "--model-repository", repository, prefix=pinned, environment=environment
        ) as process:
            assert process.events[-1].get("workers", 1) == count
            assert codes(process) == {"OK"}
            process.popen.send_signal(signal.SIGTERM)
            assert process.popen.wait(WAIT_S) == 0


def test_there_are_as_many_workers_by_default_as_memory_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "available_cpus", lambda: 16)
    monkeypatch.setattr(runtime, "memory_limit", lambda: 4 * 2**30)
    assert default_workers("cpu", 1, 0) == 16
    assert default_workers("cpu", 4, 0) == 4
    assert default_workers("cpu", 1, 2**28) == 4  # 256 MiB and three times the model for each
    assert default_workers("cpu", 1, 2**40) == 1
    assert default_workers("cuda", 1, 0) == 1


def test_what_a_client_loads_in_one_is_loaded_in_all(repository: Path, tmp_path: Path) -> None:
    publish(repository / UNIFORM.name / "1", tmp_path / UNIFORM.name, 1)
    with (
        serving("--model-repository", tmp_path, "--model-control", "explicit", *TWO) as process,
        connections(process) as channels,
    ):
        stub = GRPCInferenceServiceStub(channels[0])
        watches = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            for channel in channels
        ]
        assert {next(w).status for w in watches} == {health_pb2.HealthCheckResponse.NOT_SERVING}
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=UNIFORM.name))
        assert {next(w).status for w in watches} == {health_pb2.HealthCheckResponse.SERVING}
        assert codes(process) == {"OK"}
        with pytest.raises(grpc.RpcError) as refused:
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="none"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=UNIFORM.name))
        assert {next(w).status for w in watches} == {health_pb2.HealthCheckResponse.NOT_SERVING}
        assert codes(process) == {"UNAVAILABLE"}


def test_one_that_dies_is_replaced_and_serves_what_it_had_been_told_to(
    repository: Path, tmp_path: Path
) -> None:
    publish(repository / UNIFORM.name / "1", tmp_path / UNIFORM.name, 1)
    with serving("--model-repository", tmp_path, "--model-control", "explicit", *TWO) as process:
        with grpc.insecure_channel(process.address) as channel:
            GRPCInferenceServiceStub(channel).RepositoryModelLoad(
                pb.RepositoryModelLoadRequest(model_name=UNIFORM.name)
            )
        started = {e["worker"]: e["pid"] for e in process.events if e["event"] == "worker_started"}
        listening = process.events[-1]
        os.kill(started[1], signal.SIGKILL)
        died = process.until("worker_died")
        assert (died["worker"], died["code"]) == (1, -signal.SIGKILL)
        assert process.until("worker_started")["worker"] == 1
        while process.until("model_ready")["worker"] != 1:
            pass
        process.events.append(listening)
        await_true(lambda: len(scraped(process).get("kanserve_model_state", {})) == 2)
        assert codes(process) == {"OK"}
        assert scraped(process)["kanserve_worker_deaths_total"] == {"": 1}


def test_workers_do_not_outlive_who_keeps_them(repository: Path) -> None:
    with serving("--model-repository", repository, *TWO) as process:
        pids = [e["pid"] for e in process.events if e["event"] == "worker_started"]
        assert not any(has_ended(pid) for pid in pids)
        process.popen.kill()
        await_true(lambda: all(has_ended(pid) for pid in pids))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(["EMPTY"], "no bundle found", id="empty"),
        pytest.param(["REPO", "--provider", "cuda"], "provider cuda", id="cuda"),
        pytest.param(["REPO", "--grpc-port", "PORT"], "cannot listen", id="port"),
    ],
)
def test_what_a_worker_refuses_is_refused_once(
    repository: Path, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    with serving("--model-repository", repository, *TWO) as other:
        port = other.address.rpartition(":")[2]
        places = {"REPO": str(repository), "EMPTY": str(tmp_path), "PORT": port}
        ours = (places.get(argument, argument) for argument in arguments)
        done = run_module(
            "serving", *TWO, "--grpc-port", "0", "--metrics-port", "0", "--model-repository", *ours
        )
    assert done.returncode == 1, done.stderr
    errors = [json.loads(line) for line in done.stderr.splitlines()]
    (refused,) = (event for event in errors if event["level"] == "error")
    assert refused["event"] == "refused_to_start"
    assert reason in refused["reason"]
