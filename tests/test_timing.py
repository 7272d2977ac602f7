"""What `--benchmark` times: each runtime by itself."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from numpy.typing import NDArray

from export.benchmark import benchmark
from export.inputs import read_inputs
from export.probes import make_probes


class Runtime:
    """Holds itself, as sessions with callbacks do."""

    def __init__(self) -> None:
        self.itself = self
        self.rows: list[int] = []

    def __call__(self, inputs: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
        self.rows.append(len(inputs[0]))
        return inputs


def test_a_runtime_is_let_go_before_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.benchmark._LONGEST_S", 0)
    monkeypatch.setattr("export.benchmark._PAUSE_S", 0)
    made: list[weakref.ref[Runtime]] = []
    alive: list[int] = []

    def load() -> Runtime:
        alive.append(sum(one() is not None for one in made))
        runtime = Runtime()
        made.append(weakref.ref(runtime))
        return runtime

    runtimes: dict[str, Callable[[], Runtime]] = dict.fromkeys(("a", "b", "c"), load)
    inputs = read_inputs(3, None)
    assert inputs is not None
    found = benchmark(runtimes, make_probes(inputs))
    assert alive == [0, 0, 0]
    assert {(speed.runtime, speed.rows) for speed in found.speeds} == {
        (name, rows) for name in "abc" for rows in (1, 16, 256, 1024)
    }
    assert all(speed.calls == 3 for speed in found.speeds)
