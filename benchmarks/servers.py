"""The servers that are compared: how each is started, what it costs, and how it ends.

Every server gets the same CPUs and no others, in a process group of its own. Rivals run from
rivals/, each in its own environment at the repository's root, `.venv-rival-NAME`.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.load import HTTP_PATH, Target, Unanswered, Wire, transport
from protos import inference_pb2 as pb

ROOT = Path(__file__).parent.parent
_RIVALS = Path(__file__).parent / "rivals"
TWO_WORKERS = "kanserve 2 workers"
_ECHOES = ("echo C++", "echo completion queue", "echo", "echo 4 threads", "echo asyncio")
_START_S = 120.0
_END_S = 30.0
_LOOK_S = 0.01


class NotStarted(Exception):
    """A server is not installed, or did not answer in time; the message says what to do."""


@dataclass(frozen=True)
class Question:
    """What is asked, and what is to be answered.

    Args:
        x: Rows of inputs.
        expected: The model's answer.
    """

    x: NDArray[np.float32]
    expected: NDArray[np.float32]

    def message(self, model: str, wire: Wire) -> bytes:
        """Write it as it is sent."""
        raw = self.x.astype("<f4").tobytes()
        if wire == "http":
            return raw
        tensor = pb.ModelInferRequest.InferInputTensor(
            name="input", datatype="FP32", shape=self.x.shape
        )
        request = pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[raw])
        return request.SerializeToString()

    def is_answered_by(self, answer: bytes, wire: Wire) -> bool:
        """Whether an answer is the model's."""
        if wire == "grpc":
            (answer,) = pb.ModelInferResponse.FromString(answer).raw_output_contents
        found = np.frombuffer(answer, "<f4")
        return found.size == self.expected.size and np.allclose(
            found.reshape(self.expected.shape), self.expected, rtol=1e-4, atol=1e-4
        )


@dataclass(frozen=True)
class Place:
    """Where a server is to run, and what it is to serve.

    Args:
        bundle: A version's folder, as the export writes it.
        port: To listen on.
        scratch: An empty folder.
        question: What it will be asked.
    """

    bundle: Path
    port: int
    scratch: Path
    question: Question


@dataclass(frozen=True)
class Contender:
    """A server.

    Args:
        name: As it is shown.
        meaning: What runs.
        wire: How it is asked.
        environment: Its folder at the repository's root; None for our own.
        arguments: What comes after the interpreter.
        rival: Whether it is somebody else's.
        path: Of the URL, over HTTP.
    """

    name: str
    meaning: str
    wire: Wire
    environment: str | None
    arguments: Callable[[Place], list[str]]
    rival: bool = True
    path: str = HTTP_PATH

    @property
    def python(self) -> Path:
        """Its interpreter."""
        if self.environment is None:
            return Path(sys.executable)
        return ROOT / self.environment / "bin" / "python"


def _script(name: str) -> Callable[[Place], list[str]]:
    def arguments(place: Place) -> list[str]:
        where = ["--port", str(place.port), "--folder", str(place.scratch)]
        return [str(_RIVALS / f"{name}.py"), "--model", str(place.bundle / "model.onnx"), *where]

    return arguments


def _echo(*flags: str, script: str = "echo") -> Callable[[Place], list[str]]:
    def arguments(place: Place) -> list[str]:
        rows, columns = place.question.expected.shape  # its answers are as long as the model's
        shape = ["--rows", str(rows), "--outputs", str(columns)]
        return [*_script(script)(place), *shape, *flags]

    return arguments


def kanserve(*flags: str, drain_s: float = 0.0) -> Callable[[Place], list[str]]:
    """Start our own server, with more flags."""

    def arguments(place: Place) -> list[str]:
        repository = ["--model-repository", str(place.bundle.parent.parent)]
        ports = ["--grpc-port", str(place.port), "--metrics-port", "0"]
        others = ["--log-level", "warning", "--drain-s", str(drain_s)]
        return ["-m", "serving", *repository, *ports, *others, *flags]

    return arguments


CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(
            "echo C++",
            "a bare gRPC server in C++, which parses nothing and answers every request with the "
            "same bytes: the limit of any gRPC server",
            "grpc",
            None,
            _echo(script="echo_cpp"),
            rival=False,
        ),
        Contender(
            "echo completion queue",
            "the same by our own way to gRPC's core, without a model: what our transport costs",
            "grpc",
            None,
            _echo("--completion-queue"),
            rival=False,
        ),
        Contender(
            "echo",
            "a bare grpcio server, synchronous, with a thread for each connection, which parses "
            "nothing and answers every request with the same bytes: what gRPC in Python costs",
            "grpc",
            None,
            _echo("--threads", "16"),
            rival=False,
        ),
        Contender(
            "echo 4 threads",
            "the same with four threads, its fastest",
            "grpc",
            None,
            _echo("--threads", "4"),
            rival=False,
        ),
        Contender(
            "echo asyncio",
            "the same on grpcio's asyncio server",
            "grpc",
            None,
            _echo("--asyncio"),
            rival=False,
        ),
        Contender(
            "kanserve",
            "python -m serving, as it is by default, on the operator of kan_ops",
            "grpc",
            None,
            kanserve(),
            rival=False,
        ),
        Contender(
            "kanserve standard",
            "the same on standard operators (--fused off)",
            "grpc",
            None,
            kanserve("--fused", "off"),
            rival=False,
        ),
        Contender(
            TWO_WORKERS,
            "the same as kanserve with --workers 2",
            "grpc",
            None,
            kanserve("--workers", "2"),
            rival=False,
        ),
        Contender(
            "Triton",
            "Triton's own binary with its Python backend, as nvidia-pytriton brings them: CPU, "
            "gRPC, onnxruntime in the backend's process",
            "grpc",
            ".venv-rival-triton",
            _script("triton"),
        ),
        Contender(
            "MLServer",
            "MLServer with a runtime of a few lines around onnxruntime, gRPC",
            "grpc",
            ".venv-rival-mlserver",
            _script("mlserver"),
        ),
        Contender(
            "TorchServe",
            "TorchServe with a handler around onnxruntime, HTTP with raw bytes: its gRPC takes "
            "typed contents alone",
            "http",
            ".venv-rival-torchserve",
            _script("torchserve"),
            path="/predictions/digits",
        ),
        Contender(
            "Ray Serve",
            "Ray Serve with our protocol's servicer around onnxruntime, the replica answering gRPC "
            "itself",
            "grpc",
            ".venv-rival-ray",
            _script("ray"),
        ),
        Contender(
            "LitServe",
            "LitServe around onnxruntime, HTTP with raw bytes",
            "http",
            ".venv-rival-litserve",
            _script("litserve"),
        ),
        Contender(
            "BentoML",
            "BentoML around onnxruntime, HTTP with raw bytes",
            "http",
            ".venv-rival-bentoml",
            _script("bentoml"),
        ),
    )
}


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Args:
        target: Whom to ask, and what it was asked first.
        start_s: From its start to its first right answer.
        group: Its processes.
    """

    target: Target
    start_s: float
    group: int

    def memory_mb(self) -> float:
        """Tell what its processes hold now; what they share counts once."""
        return sum(_pss_kb(pid) for pid in _members(self.group)) / 1024


@contextmanager
def started(
    contender: Contender, bundle: Path, question: Question, cpus: str, port: int | None = None
) -> Iterator[Running]:
    """Run a server until the end of the block.

    Args:
        contender: Which.
        bundle: A version's folder, as the export writes it.
        question: What it is asked first, and will be asked by the load.
        cpus: Where it may run, as taskset takes them.
        port: To listen on; by default a free one.

    Raises:
        NotStarted: It is not installed, or gives no right answer in time.
    """
    if not contender.python.exists():
        raise NotStarted(
            f"{contender.name} is not installed; run `make {contender.environment}/installed`"
        )
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        place = Place(bundle, port or free_port(), Path(folder) / "scratch", question)
        place.scratch.mkdir()
        payload = Path(folder) / "payload"
        payload.write_bytes(question.message(bundle.parent.name, contender.wire))
        begun = time.perf_counter()
        process = subprocess.Popen(
            ["taskset", "-c", cpus, str(contender.python), *contender.arguments(place)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = f"127.0.0.1:{place.port}"
            answer = _await_answer(process, contender, address, payload.read_bytes())
            start_s = time.perf_counter() - begun
            if answer is None or not (
                contender.name in _ECHOES or question.is_answered_by(answer, contender.wire)
            ):
                log.seek(0)
                wrong = "no answer" if answer is None else "a wrong answer"
                raise NotStarted(f"{contender.name} gives {wrong}: {log.read()[-500:]!r}")
            target = Target(address, contender.wire, str(payload), len(answer), contender.path)
            yield Running(target, start_s, process.pid)
        finally:
            _end(process)


def _await_answer(
    process: "subprocess.Popen[bytes]", contender: Contender, address: str, payload: bytes
) -> bytes | None:
    """Ask until there is an answer."""
    end = time.perf_counter() + _START_S
    while time.perf_counter() < end and process.poll() is None:
        with suppress(Unanswered):
            return transport(address, contender.wire, payload, path=contender.path)()
        time.sleep(_LOOK_S)
    return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a server to end, and make sure that nothing of it is left."""
    members = _members(process.pid)
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    for pid in {*members, *_members(process.pid)}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _members(leader: int) -> list[int]:
    """List the processes of a server: of its session, and whatever those have started."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            pid = int(entry.name)
            # The name, in brackets, may hold anything; the parent comes second after it.
            parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if os.getsid(pid) == leader:
                found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def _pss_kb(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
