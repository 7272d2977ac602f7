"""`python -m tests.chaos.workers`: random faults of workers under load, and whether they agree.

Faults come one after the other, from a seed: workers are killed and stopped, also while they load;
versions are loaded, and a second model is loaded and unloaded; files are damaged, and fail for a
moment; the server is scraped. After each, all workers must serve the same within a time. Clients
ask meanwhile: our own, which may not fail, and connections that are watched for wrong versions.
"""

import argparse
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from export import export_checkpoint
from export.report import Report
from kan_model import KAN
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client import KanClient
from tests.bundles import publish, run_onnx
from tests.supervised import Supervised, scraped, supervised
from tests.wire import raw_output, raw_request

WORKERS = 3
OVER_S = 10.0
AGREE_S = 2.0
_WATCHED = 12  # connections, which the system gives to workers by chance
_PACE_S = 0.02
X = np.linspace(-0.9, 0.9, 12, dtype=np.float32).reshape(3, 4)


@dataclass
class Bundles:
    """What odd and even versions are made of, and what they answer."""

    folder: Path
    answers: list[NDArray[np.float32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        report = Report(Console(file=io.StringIO()))
        for seed in (1, 2):
            torch.manual_seed(seed)
            torch.save(KAN([4, 8, 3]).state_dict(), self.folder / "m.pt")
            export_checkpoint(
                self.folder / "m.pt", output=self.folder, activation="silu", report=report
            )
            self.answers += run_onnx(self.folder / "m" / str(seed), X)

    def publish(self, root: Path, version: int, name: str = "m") -> Path:
        return publish(self.folder / "m" / str(2 - version % 2), root / name, version)

    def is_right(self, version: int, found: NDArray[np.float32]) -> bool:
        return bool(np.allclose(found, self.answers[1 - version % 2], rtol=1e-4, atol=1e-4))


@dataclass
class Clients:
    """Who asks meanwhile, and what was wrong with the answers.

    Args:
        server: Whom they ask.
        bundles: What is right.
        committed: Versions by the time when all workers were to serve them; the last one counts.
        loading: A version that may come at any moment.
    """

    server: Supervised
    bundles: Bundles
    committed: list[tuple[float, int]]
    loading: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: Counter[int] = field(default_factory=Counter)
    """Calls that failed since the last fault, by connection."""

    def check(self, version: int, found: NDArray[np.float32], asked_at: float) -> None:
        allowed = {self.loading, self.committed[-1][1]}
        allowed |= {
            v
            for (_, v), (until, _) in zip(self.committed, self.committed[1:], strict=False)
            if until + AGREE_S >= asked_at
        }
        if version not in allowed:
            self.wrong.append(f"version {version} is served, not {sorted(allowed)}")
        if not self.bundles.is_right(version, found):
            self.wrong.append(f"version {version} gave another's answer")

    @contextmanager
    def asking(self) -> Iterator[None]:
        stopped = threading.Event()
        threads = [
            threading.Thread(target=target, args=(stopped,))
            for target in (self._client, self._client, self._connections)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stopped.set()
            for thread in threads:
                thread.join()

    def _client(self, stopped: threading.Event) -> None:
        with KanClient(self.server.process.address) as client:
            while not stopped.wait(_PACE_S):
                asked_at = time.monotonic()
                try:
                    answer = client.infer_all("m", X, timeout_s=30.0)
                except Exception as error:
                    self.wrong.append(f"our client failed: {type(error).__name__}: {error}"[:300])
                    continue
                self.asked["client"] += 1
                (found,) = answer.outputs.values()
                self.check(int(answer.version), found, asked_at)

    def _connections(self, stopped: threading.Event) -> None:
        """Ask over connections of their own, which a dead worker ends."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        with ExitStack() as cleanup:
            channels = [
                cleanup.enter_context(grpc.insecure_channel(self.server.process.address, options))
                for _ in range(_WATCHED)
            ]
            stubs = [GRPCInferenceServiceStub(channel) for channel in channels]
            while not stopped.wait(_PACE_S):
                for number, stub in enumerate(stubs):
                    asked_at = time.monotonic()
                    try:
                        answer = stub.ModelInfer(
                            raw_request(X, "m"), timeout=30.0, wait_for_ready=True
                        )
                    except grpc.RpcError as error:
                        self.asked[error.code().name] += 1
                        self.failed[number] += 1
                        if error.code() is not grpc.StatusCode.UNAVAILABLE:
                            self.wrong.append(f"a connection failed: {error.code()}")
                        elif self.failed[number] > 1:  # it has one call under way at a time
                            self.wrong.append("a connection failed twice in one fault")
                        continue
                    self.asked["connection"] += 1
                    self.check(int(answer.model_version), raw_output(answer), asked_at)


class Faults:
    """What can happen. Each method is one kind.

    Args:
        server: To which.
        bundles: What versions are made of.
        chance: Decides.
        clients: Who must be told which version may come.
    """

    def __init__(
        self, server: Supervised, bundles: Bundles, chance: random.Random, clients: Clients
    ) -> None:
        self._server = server
        self._bundles = bundles
        self._chance = chance
        self._clients = clients
        self.version = 1
        self._has_spare = False

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def load(self) -> None:
        """Load a new version, which must be served if it is said to be loaded."""
        self._load()

    def kill_while_loading(self) -> None:
        go = self._server.root.parent / "go"
        go.unlink(missing_ok=True)
        self._server.inject({"suffix": "golden.npz", "pid": self._pid(), "until": str(go)})
        loading = threading.Thread(target=self._load)
        loading.start()
        time.sleep(self._chance.uniform(0.0, 0.3))  # a random moment of it
        self._signal(self._chance.choice((signal.SIGKILL, signal.SIGSTOP)))
        go.touch()
        loading.join()

    def damage(self) -> None:
        """Have a version loaded that is damaged: what served goes on."""
        number = self.version + 1
        folder = self._bundles.publish(self._server.root, number)
        damaged = folder / self._chance.choice(("model.onnx", "golden.npz", "manifest.json"))
        damaged.write_bytes(damaged.read_bytes()[:-1])
        if self._asked_until_known() is grpc.StatusCode.OK:
            self._clients.wrong.append("a damaged version was loaded")
        shutil.rmtree(folder)

    def fail_for_a_moment(self) -> None:
        """Have files fail in one process or all while a version is loaded, then not any more."""
        error = self._chance.choice(("ENOSPC", "ESTALE", "EIO", "MemoryError", "EMFILE"))
        rule: dict[str, Any] = {
            "suffix": self._chance.choice(("golden.npz", "model.onnx")),
            "error": error,
        }
        if self._chance.random() < 0.5:
            rule["pid"] = self._pid()
        self._server.inject(rule)
        self._load()

    def spare(self) -> None:
        """Load or unload another model."""
        if not self._has_spare:
            self._has_spare = self._server.load("spare") is grpc.StatusCode.OK
        else:
            self._has_spare = self._server.unload("spare") is not grpc.StatusCode.OK

    def scrape(self) -> None:
        scraped(self._server.process)

    def _load(self) -> None:
        number = self.version + 1
        folder = self._bundles.publish(self._server.root, number)
        self._clients.loading = number
        code = self._asked_until_known()
        self._server.inject()
        if code is grpc.StatusCode.OK:
            self._clients.committed.append((time.monotonic(), number))
            self.version = number
            shutil.rmtree(self._server.root / "m" / str(number - 1))
        else:
            shutil.rmtree(folder)
            self._asked_until_known()
        self._clients.loading = 0

    def _asked_until_known(self) -> grpc.StatusCode:
        """Ask for a load until a worker that is asked lives long enough to say how it ended."""
        for _ in range(20):
            code = self._server.load("m")
            if code is not grpc.StatusCode.UNAVAILABLE:
                return code
        return code

    def _pid(self) -> int:
        return self._chance.choice(list(self._server.pids.values()))

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid(), number)


def run(
    folder: Path,
    faults: int,
    seed: int,
    report: Callable[[str], None],
    worker_timeout_s: float = 2.0,
) -> list[str]:
    """Have so many faults happen; return what was wrong.

    Args:
        folder: For models.
        faults: How many.
        seed: Decides which, and when.
        report: Takes a line now and then.
        worker_timeout_s: After which a worker that does not answer is killed, in seconds.
    """
    chance = random.Random(seed)
    (folder / "bundles").mkdir()
    bundles = Bundles(folder / "bundles")
    root = folder / "models"
    bundles.publish(root, 1)
    bundles.publish(root, 1, "spare")
    slowest, happened = 0.0, Counter[str]()
    settings = ["--model-control", "explicit", "--load-models", '["m"]', "--grace-s", "2"]
    settings += ["--worker-timeout-s", str(worker_timeout_s)]
    with supervised(root, *settings, workers=WORKERS) as server:
        clients = Clients(server, bundles, [(time.monotonic(), 1)])
        kinds = Faults(server, bundles, chance, clients)
        every = [kinds.kill, kinds.freeze, kinds.load, kinds.load, kinds.kill_while_loading]
        every += [kinds.damage, kinds.fail_for_a_moment, kinds.spare, kinds.scrape]
        with clients.asking():
            for number in range(faults):
                fault = chance.choice(every)
                happened[fault.__name__] += 1
                clients.failed.clear()
                fault()
                started = time.monotonic()
                while not _agree(server, kinds.version):
                    if time.monotonic() - started > OVER_S:
                        clients.wrong.append(f"fault {number}, {fault.__name__}: not over")
                        break
                slowest = max(slowest, time.monotonic() - started)
                if number % 20 == 19 or clients.wrong:
                    report(f"{number + 1} faults, slowest over in {slowest:.1f} s, {clients.wrong}")
                if len(clients.wrong) > 5:
                    break
        os.kill(server.pids[0], signal.SIGSTOP)
        started = time.monotonic()
        server.process.popen.send_signal(signal.SIGTERM)
        server.process.popen.wait(60.0)
        stopped_s = time.monotonic() - started
        if stopped_s > 2.0 + 2.0:
            clients.wrong.append(f"stopped after {stopped_s:.1f} s")
    report(f"{dict(happened)}; asked {dict(clients.asked)}")
    report(f"slowest over in {slowest:.1f} s; stopped in {stopped_s:.1f} s with a worker frozen")
    return clients.wrong


def _agree(server: Supervised, version: int) -> bool:
    """Whether all workers take connections and serve one version."""
    if scraped(server.process).get("kanserve_workers") != {"": WORKERS}:
        return False
    return server.served_versions() == {str(version): WORKERS}


def main(argv: Sequence[str] | None = None) -> int:
    """Trouble a server of several processes."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.workers", description=main.__doc__)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker-timeout-s", type=float, default=5.0, help="as of the server")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        wrong = run(
            Path(name),
            arguments.faults,
            arguments.seed,
            lambda line: print(line, flush=True),
            arguments.worker_timeout_s,
        )
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
