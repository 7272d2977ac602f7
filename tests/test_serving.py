"""The server's life: it starts, serves, drains and stops, whatever its clients do."""

import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.__main__ import _Ends, _stopped_line, main
from serving.engine import Engine
from serving.server import Server, running
from serving.settings import Settings
from tests.conftest import ROOT, STATE_DICTS
from tests.processes import serving
from tests.wire import raw_output, raw_request

UNIFORM = STATE_DICTS[0]
SERVING = health_pb2.HealthCheckResponse.SERVING


@contextmanager
def served(repository: Path) -> Iterator[tuple[Server, GRPCInferenceServiceStub]]:
    """A server in this process, for what must be seen from inside, and a client of it."""
    settings = Settings(model_repository=repository, grpc_port=0, metrics_port=0)
    with running(settings) as server, grpc.insecure_channel(server.address) as channel:
        yield server, GRPCInferenceServiceStub(channel)


def test_it_starts_serves_drains_and_stops(repository: Path, tmp_path: Path) -> None:
    address_file = tmp_path / "addresses.json"
    with serving(
        "--model-repository", repository, "--address-file", address_file, "--drain-s", "0"
    ) as process:
        assert json.loads(address_file.read_text())["grpc"] == process.address
        assert process.names() == ["model_ready"] * len(STATE_DICTS) + ["listening"]
        assert all({"level", "time"} <= set(event) for event in process.events)
        with grpc.insecure_channel(process.address) as channel:
            found = raw_output(
                GRPCInferenceServiceStub(channel).ModelInfer(raw_request(UNIFORM.x, UNIFORM.name))
            )
        np.testing.assert_allclose(found, UNIFORM.y64, rtol=1e-5, atol=1e-5)
        process.popen.send_signal(signal.SIGTERM)
        process.until("stopped")
        assert process.popen.wait(10) == 0
        assert process.names()[-2:] == ["draining", "stopped"]
        assert process.popen.stdout is not None
        assert process.popen.stdout.read() == ""


def test_draining_turns_readiness_off_while_requests_are_still_answered(repository: Path) -> None:
    with serving("--model-repository", repository, "--drain-s", "600") as process:
        with grpc.insecure_channel(process.address) as channel:
            stub, health = GRPCInferenceServiceStub(channel), health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            process.popen.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            live = health.Check(health_pb2.HealthCheckRequest(service="live"))
            assert live.status == health_pb2.HealthCheckResponse.SERVING
            assert not stub.ServerReady(pb.ServerReadyRequest()).ready
            assert stub.ServerLive(pb.ServerLiveRequest()).live
            assert raw_output(stub.ModelInfer(raw_request(UNIFORM.x))).shape == UNIFORM.y64.shape
            process.popen.send_signal(signal.SIGTERM)  # the second one does not wait
            process.until("stopped")
        assert process.popen.wait(10) == 0


@contextmanager
def one_running(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, GRPCInferenceServiceStub, Any, threading.Event]]:
    """A server with one request that runs until the event is set, and that request."""
    entered, leave = threading.Event(), threading.Event()
    run = Engine.run

    def slow(engine: Any, inputs: Any) -> Any:
        if threading.current_thread().name.startswith("engine-"):  # not while it is loaded
            entered.set()
            assert leave.wait(60)
        return run(engine, inputs)

    monkeypatch.setattr(Engine, "run", slow)
    with served(repository) as (server, stub):
        answer = stub.ModelInfer.future(raw_request(UNIFORM.x[:1]))
        assert entered.wait(30)
        try:
            yield server, stub, answer, leave
        finally:
            leave.set()


def call_until_refused(stub: GRPCInferenceServiceStub) -> None:
    for _ in range(100_000):
        stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=30)


def test_a_running_request_is_finished_while_new_ones_are_refused(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_running(repository, monkeypatch) as (server, stub, answer, leave):
        server.drain()
        stopping = threading.Thread(target=server.stop, args=(60, lambda: False))
        stopping.start()
        with pytest.raises(grpc.RpcError):
            call_until_refused(stub)
        assert not answer.done()
        leave.set()
        assert raw_output(answer.result(30)).shape == (1, 3)
        stopping.join(30)
        assert not stopping.is_alive()


def test_a_second_signal_does_not_wait_for_running_requests(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_running(repository, monkeypatch) as (server, stub, answer, _):
        now = threading.Event()
        stopping = threading.Thread(target=server.stop, args=(600, now.is_set))
        stopping.start()
        with pytest.raises(grpc.RpcError):
            call_until_refused(stub)
        assert stopping.is_alive()
        now.set()
        stopping.join(30)
        assert not stopping.is_alive()
        assert answer.exception(30).code() is not grpc.StatusCode.OK


def test_probes_are_answered_however_busy_the_server_is(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_running(repository, monkeypatch) as (server, stub, _, _):
        row = raw_request(UNIFORM.x[:1])
        waiting = [stub.ModelInfer.future(row) for _ in range(10)]  # more than there are threads
        assert stub.ServerLive(pb.ServerLiveRequest(), timeout=30).live
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=30).ready
        with grpc.insecure_channel(server.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            assert check(health_pb2.HealthCheckRequest(), timeout=30).status == SERVING
        assert not any(answer.done() for answer in waiting)


def open_reflection(channel: grpc.Channel) -> tuple[Any, threading.Event]:
    """A reflection stream that has had one answer and stays open."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    hold = threading.Event()

    def requests() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield request
        hold.wait(60)

    stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(requests())
    next(stream)
    return stream, hold  # a stream that nobody holds is cancelled


def test_open_streams_neither_block_requests_nor_hold_up_the_end(repository: Path) -> None:
    with (
        serving("--model-repository", repository, "--drain-s", "0", "--grace-s", "600") as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        watches = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            for _ in range(5)
        ]
        assert [next(watch).status for watch in watches] == [SERVING] * 5
        reflections = [open_reflection(channel) for _ in range(2)]
        stub = GRPCInferenceServiceStub(channel)
        found = raw_output(stub.ModelInfer(raw_request(UNIFORM.x), timeout=30))
        assert found.shape == UNIFORM.y64.shape
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(30) == 0  # not after the grace of ten minutes
        process.until("stopped")
        for _, hold in reflections:
            hold.set()


def test_a_signal_in_the_moment_of_waiting_for_one_is_taken() -> None:
    """With an Event in place of the queue, this waits for its own lock within a second."""
    script = (
        "import signal; from serving.__main__ import _Ends;"
        "ends = _Ends(); ends.listening = True;"
        "signal.signal(signal.SIGALRM, ends.on_signal);"
        "signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4);\n"
        "while ends.count < 10_000: ends.wait(0)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_who_waits_for_a_signal_looks_up_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python runs a handler only in a thread that is awake, and not every signal wakes it."""
    ends = _Ends()
    ends.listening = True
    slept = []

    class Deaf:
        """Sleeps through a signal, as a lock does that is taken just after it."""

        def get(self, timeout: float) -> None:
            slept.append(timeout)
            if len(slept) == 3:
                return
            raise Empty

    monkeypatch.setattr(ends, "_news", Deaf())
    ends.wait()
    assert len(slept) == 3
    assert max(slept) <= 1


def test_the_last_line_of_an_early_end_is_as_the_log_writes_it() -> None:
    script = (
        "import structlog; from serving.__main__ import _Ends;"
        "from serving.observability.logs import configure_logging; configure_logging('info');"
        "structlog.get_logger().info('stopped'); _Ends().on_signal(15, None)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    late, early = map(json.loads, done.stderr.splitlines())
    gone = datetime.fromisoformat(early.pop("time")) - datetime.fromisoformat(late.pop("time"))
    assert early == late
    assert gone >= timedelta(0)
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    line = _stopped_line(int(moment.timestamp()) * 10**9 + 67_999)
    assert json.loads(line)["time"] == "2026-01-02T03:04:05.000067Z"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_of_the_start_ends_it_cleanly(
    repository: Path, signum: signal.Signals
) -> None:
    """Before its handlers are set Python's own apply; after that it is 0, and never a traceback."""
    command = [sys.executable, "-m", "serving", "--model-repository", str(repository)]
    source, first = inspect.getsourcelines(main)
    handlers_set = first + [i for i, line in enumerate(source) if "signal.signal(" in line][-1]
    codes: list[int] = []
    for moment_s in (*(n / 20 for n in range(1, 16)), 1.5, 3, 6, 12, 24):
        if moment_s > 0.75 and 0 in codes:  # later ones are for a busy machine
            break
        with subprocess.Popen(
            [*command, "--grpc-port", "0", "--metrics-port", "0"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        ) as popen:
            with pytest.raises(subprocess.TimeoutExpired):
                popen.wait(moment_s)
            popen.send_signal(signum)
            _, log = popen.communicate(timeout=30)
        codes.append(popen.returncode)
        if popen.returncode != 0:  # the interpreter itself was still starting
            interrupted = re.findall(r"line (\d+), in main\n", log)
            assert all(int(line) <= handlers_set for line in interrupted), log
            continue
        for line in log.splitlines():
            assert datetime.fromisoformat(json.loads(line)["time"]).tzinfo is UTC
    assert 0 in codes, "no signal met a handler, so nothing was tested"


def test_a_damaged_model_is_logged_and_not_ready_and_the_others_are(
    repository: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    shutil.copytree(repository, root)
    (root / UNIFORM.name / "1" / "model.onnx").write_bytes(b"damaged")
    with serving("--model-repository", root) as process:
        refused = [e for e in process.events if e["event"] == "model_refused"]
        assert [(e["model"], e["version"], e["level"]) for e in refused] == [
            (UNIFORM.name, 1, "error")
        ]
        assert "model.onnx: expected" in refused[0]["reason"]
        with grpc.insecure_channel(process.address) as channel:
            stub = GRPCInferenceServiceStub(channel)
            assert stub.ServerReady(pb.ServerReadyRequest()).ready
            assert not stub.ModelReady(pb.ModelReadyRequest(name=UNIFORM.name)).ready
            with pytest.raises(grpc.RpcError) as error:
                stub.ModelInfer(raw_request(UNIFORM.x))
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert str(tmp_path) not in str(error.value.details())
            other = STATE_DICTS[1]
            found = raw_output(stub.ModelInfer(raw_request(other.x, other.name)))
            np.testing.assert_allclose(found, other.y64, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_that_will_never_serve_anything_says_what_to_do(
    repository: Path, tmp_path: Path, workers: str
) -> None:
    root = tmp_path / "models"
    shutil.copytree(repository / UNIFORM.name, root / UNIFORM.name)
    (root / UNIFORM.name / "1" / "model.onnx").write_bytes(b"damaged")
    own = ("--workers", workers, "--drain-s", "0")
    with serving("--model-repository", root, *own) as process:
        process.popen.terminate()
        process.until("stopped")
        (told,) = (event for event in process.events if event["event"] == "nothing_served")
        assert told["level"] == "warning"
        assert "model_refused says" in told["remedy"]
        assert "--model-control poll" in told["remedy"]
    with serving("--model-repository", root, *own, "--model-control", "poll") as process:
        process.popen.terminate()
        process.until("stopped")
        assert "nothing_served" not in process.names()  # it looks again


def test_an_internal_error_tells_the_client_nothing(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(engine: Any, inputs: Any) -> None:
        raise RuntimeError("internal detail")

    with served(repository) as (_, stub):
        monkeypatch.setattr(Engine, "run", fail)
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(raw_request(UNIFORM.x))
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert error.value.details() == "internal error; the server's log says more"


def test_protobuf_7_serves_a_protobuf_6_client(repository: Path) -> None:
    """The committed modules run on both; this process has 6, the server's environment has 7."""
    python = ROOT / ".venv-protobuf7" / "bin" / "python"
    assert python.exists(), "run `make test`, which makes the environment"
    version = subprocess.run(
        [python, "-c", "import google.protobuf as p; print(p.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert version.stdout.startswith("7.")
    warnings = {"PYTHONWARNINGS": "error"}
    with (
        serving(
            "--model-repository", repository, python=str(python), environment=warnings
        ) as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        stub = GRPCInferenceServiceStub(channel)
        for golden in STATE_DICTS:
            found = raw_output(stub.ModelInfer(raw_request(golden.x, golden.name)))
            np.testing.assert_allclose(found, golden.y64, rtol=1e-5, atol=1e-5)
