"""Servers in the tests' own process, for what must be seen from inside."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.engine import Engine
from serving.server import Server, running
from serving.settings import Settings

WAIT_S = 60.0  # for what happens at once unless something is wrong


@contextmanager
def served(repository: Path, **settings: Any) -> Iterator[tuple[Server, GRPCInferenceServiceStub]]:
    """A server on free ports, and a client of it."""
    chosen = Settings(model_repository=repository, grpc_port=0, metrics_port=0, **settings)
    with running(chosen) as server, grpc.insecure_channel(server.address) as channel:
        yield server, GRPCInferenceServiceStub(channel)


def await_true(condition: Callable[[], bool]) -> None:
    """Look again and again until something is so."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end


@dataclass
class Gate:
    """Holds the runs of every engine until it is opened, and remembers what was run."""

    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    opened: threading.Event = field(default_factory=threading.Event)
    runs: list[NDArray[np.float32]] = field(default_factory=list)

    def await_run(self) -> None:
        assert self.entered.acquire(timeout=WAIT_S)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate before every run of a model that is loaded already."""
    gate = Gate()
    run = Engine.run

    def held(engine: Engine, inputs: Any) -> Any:
        if threading.current_thread().name.startswith("engine-"):
            gate.runs.append(np.array(inputs[0]))
            gate.entered.release()
            assert gate.opened.wait(WAIT_S)
        return run(engine, inputs)

    monkeypatch.setattr(Engine, "run", held)
    yield gate
    gate.opened.set()
