"""A server of several processes, seen and troubled from outside."""

import json
import os
import signal
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.conftest import ROOT, STATE_DICTS
from tests.processes import Process, serving
from tests.servers import WAIT_S, await_true
from tests.wire import raw_request

UNIFORM = STATE_DICTS[0]
NAME = UNIFORM.name
INJECTED = str(ROOT / "tests" / "injected")
CONNECTIONS = 32  # which of the workers takes one is chance


@contextmanager
def connections(process: Process, count: int = CONNECTIONS) -> Iterator[list[grpc.Channel]]:
    """Channels with a connection each."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(process.address, options) for _ in range(count)]
    try:
        yield channels
    finally:
        for channel in channels:
            channel.close()


def samples(process: Process) -> list[Any]:
    """Every sample of the endpoint."""
    address = process.events[-1]["metrics"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as response:
        text = response.read().decode()
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def scraped(process: Process) -> dict[str, dict[str, float]]:
    """Every sample, summed up by name and worker."""
    found: dict[str, dict[str, float]] = {}
    for sample in samples(process):
        of_name = found.setdefault(sample.name, {})
        worker = sample.labels.get("worker", "")
        of_name[worker] = of_name.get(worker, 0.0) + sample.value
    return found


def states(process: Process) -> dict[tuple[str, str], float]:
    """How many workers have a version in a state."""
    found: dict[tuple[str, str], float] = {}
    for sample in samples(process):
        if sample.name == "kanserve_model_state":
            key = sample.labels["version"], sample.labels["state"]
            found[key] = found.get(key, 0.0) + sample.value
    return found


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for somebody to ask how it ended."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


@dataclass
class Supervised:
    """A server of several processes, its models, and the faults of its files."""

    process: Process
    root: Path
    faults: Path
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log = list(self.process.events)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.popen.stderr is not None
        for line in self.process.popen.stderr:
            self.log.append(json.loads(line))

    @property
    def pids(self) -> dict[int, int]:
        """The processes, by number of the worker."""
        started = [event for event in self.log if event["event"] == "worker_started"]
        return {event["worker"]: event["pid"] for event in started}

    def await_event(self, name: str, count: int = 1, **fields: Any) -> None:
        def is_there() -> bool:
            found = [e for e in self.log if e["event"] == name and fields.items() <= e.items()]
            return len(found) >= count

        await_true(is_there)

    def await_workers(self, count: int) -> None:
        await_true(lambda: scraped(self.process).get("kanserve_workers") == {"": count})

    def inject(self, *rules: dict[str, Any]) -> None:
        aside = self.faults.with_suffix(".new")
        aside.write_text(json.dumps(rules))
        aside.replace(self.faults)

    def served_versions(self, name: str = "m") -> dict[str, int]:
        """By how many workers each version of a model is served, as they say."""
        found: Counter[str] = Counter()
        for sample in samples(self.process):
            labels = sample.labels
            if sample.name == "kanserve_model_state" and labels["model"] == name and sample.value:
                found[labels["version"]] += labels["state"] == "READY"
        return {version: count for version, count in found.items() if count}

    def versions(self) -> set[str]:
        """What answers, over connections to every worker: versions, or the code of a failure."""
        found = set()
        with connections(self.process) as channels:
            for channel in channels:
                try:
                    answer = GRPCInferenceServiceStub(channel).ModelInfer(
                        raw_request(UNIFORM.x, NAME), timeout=WAIT_S, wait_for_ready=True
                    )
                    found.add(answer.model_version)
                except grpc.RpcError as error:
                    found.add(error.code().name)
        return found

    def load(self, name: str = NAME) -> grpc.StatusCode:
        """Ask for a load; return how that ended."""
        return self._control("Load", pb.RepositoryModelLoadRequest(model_name=name))

    def unload(self, name: str = NAME) -> grpc.StatusCode:
        """Ask for an unload; return how that ended."""
        return self._control("Unload", pb.RepositoryModelUnloadRequest(model_name=name))

    def _control(self, what: str, request: Any) -> grpc.StatusCode:
        with grpc.insecure_channel(self.process.address) as channel:
            method = getattr(GRPCInferenceServiceStub(channel), f"RepositoryModel{what}")
            try:
                method(request, timeout=WAIT_S)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
        return grpc.StatusCode.OK


@contextmanager
def supervised(root: Path, *arguments: str, workers: int = 2) -> Iterator[Supervised]:
    faults = root.parent / "faults.json"
    faults.write_text("[]")
    environment = {"PYTHONPATH": INJECTED, "FAULTY_FILES": str(faults)}
    settings = ("--workers", str(workers), "--drain-s", "0", "--worker-timeout-s", "2")
    with serving(
        *("--model-repository", str(root), *settings, *arguments),
        environment=environment,
    ) as process:
        server = Supervised(process, root, faults)
        try:
            yield server
        finally:  # one that is stopped would outlive the others
            process.popen.kill()
            for pid in server.pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
