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
from serving.budget import MESSAGE_COPIES, default_limit
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


READY_BYTES = 160 * 2**20  # what a server holds once a model of 54 MB is loaded: docs/operating.md
BESIDE_BYTES = 100 * 10**6  # what may be beside the budget: docs/operating.md


def budget_fits(settings: Settings, memory: int, beside: int = 0) -> bool:
    """Tell whether the default budget is of use, and all of it fits into a container's memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.memory.memory_limit", lambda: memory)
        patch.setattr("serving.memory.resident_bytes", lambda: READY_BYTES)
        assert settings.max_message_bytes is not None
        budget = default_limit(settings.max_message_bytes, settings.processes)
    at_a_time = budget // (MESSAGE_COPIES * settings.max_message_bytes)
    taken = (budget + READY_BYTES + BESIDE_BYTES) * settings.processes + beside
    return at_a_time >= 10 and taken <= memory


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
    """A gate before every run of a model that is loaded already; all runs have threads."""
    monkeypatch.setattr("serving.transport.completion_queue._Call.runs_short", False)
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
