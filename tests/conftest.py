"""Fixtures shared by the tests: upstream's goldens, a repository of bundles made from them once,
and a real server over it."""

import io
import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or what is started would, too
os.environ.setdefault("KANSERVE_WORKERS", "1")  # of programs; tests of workers say how many
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
# There is a test for every processor: a second thread in each, which spins while it waits, makes
# exports take 1.5 times as long. Read when torch is imported, also by programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fcntl
import gc
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import hypothesis
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from export import export_checkpoint
from export.report import Report
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import Server, running
from serving.settings import Settings
from serving.transport import trial
from tests import forkserver
from tests.browsing import FLAGS
from tests.registry import read_operators_once

if TYPE_CHECKING:
    from playwright.sync_api import Browser

Shared = Callable[[str, Callable[[Path], object]], Path]
"""Takes a name, and what fills a folder; returns the folder."""

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"


# How long an example takes is nobody's finding.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


read_operators_once()


def pytest_collection_finish() -> None:
    """Keep what is imported from the garbage collector: half a million objects that stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["without threads", "with threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether servers have threads for calls of one message; they do it either way."""
    has_threads: bool = request.param == "with threads"
    monkeypatch.setattr(trial, "is_usable", lambda: not has_threads)
    return has_threads


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test and its fixtures have the same weights, whatever ran before them."""
    torch.manual_seed(0)


@dataclass(frozen=True)
class Golden:
    """A checkpoint saved by upstream, with inputs and upstream's answers in float64."""

    name: str
    widths: list[int]
    grid_size: int = 5
    order: int = 3
    activation: str = "silu"

    @property
    def checkpoint(self) -> Path:
        return GOLDENS / f"{self.name}.pt"

    @property
    def x(self) -> NDArray[np.float32]:
        with np.load(GOLDENS / f"{self.name}.npz") as archive:
            x: NDArray[np.float32] = archive["x"]
        return x

    @property
    def y64(self) -> NDArray[np.float64]:
        with np.load(GOLDENS / f"{self.name}.npz") as archive:
            y64: NDArray[np.float64] = archive["y64"]
        return y64


STATE_DICTS = [
    Golden("uniform_4x8x3", [4, 8, 3]),
    Golden("adapted_5x7x3", [5, 7, 3]),
    Golden("order2_grid7_6x5x2", [6, 5, 2], grid_size=7, order=2),
    Golden("gelu_4x6x2", [4, 6, 2], activation="gelu"),
]


@pytest.fixture(params=STATE_DICTS, ids=lambda golden: golden.name)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each of upstream's state dicts in turn."""
    found: Golden = request.param
    return found


@pytest.fixture
def quiet() -> Report:
    """A report that nobody reads."""
    return Report(Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Makes a folder once for all processes of a run. Read only: copy to change."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # it has a folder of its own in that of the run
        root = root.parent

    def share(name: str, make: Callable[[Path], object]) -> Path:
        place = root / f"shared-{name}"
        with place.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                unfinished = Path(tempfile.mkdtemp(dir=root))
                make(unfinished)
                unfinished.rename(place)
        return place

    return share


@pytest.fixture(scope="session")
def repository(shared: Shared) -> Path:
    """A model repository with version 1 of every golden state dict. Read only: copy to change."""

    def make(root: Path) -> None:
        report = Report(Console(file=io.StringIO()))
        for golden in STATE_DICTS:
            export_checkpoint(
                golden.checkpoint, output=root, activation=golden.activation, report=report
            )

    return shared("models", make)


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[Server]:
    """A server over `repository` on a free port, in this process."""
    settings = Settings(
        model_repository=repository, grpc_port=0, metrics_port=0, max_message_bytes=2**20
    )
    with running(settings) as server:
        yield server


@pytest.fixture(scope="session")
def stub(server: Server) -> Iterator[GRPCInferenceServiceStub]:
    """A client of `server`."""
    with grpc.insecure_channel(server.address) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Chromium without a window; a page has a profile of its own (tests/browsing.py)."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)  # ms; a busy machine is no finding
    with sync_playwright() as playwright:
        # Chromium's own sandbox is not to be had as root; the pages are ours.
        browser = playwright.chromium.launch(
            executable_path=chromium, args=FLAGS, chromium_sandbox=False
        )
        yield browser
        browser.close()


def run_module(
    *arguments: str | Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -W error -m ARGUMENTS` in a new interpreter."""
    return _run([sys.executable, "-W", "error", "-m", *map(str, arguments)], environment)


def run_export(
    *arguments: str | Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -W error -m export ARGUMENTS` in a fork of a warm process (forkserver.py)."""
    words = forkserver.command("-W", "error", "-m", "export", *map(str, arguments))
    return _run(words, environment)


def _run(
    command: list[str], environment: dict[str, str] | None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
