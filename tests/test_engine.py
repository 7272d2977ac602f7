import gc
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from kan_bundle.manifest import read_manifest
from serving import runtime
from serving.buffers import BufferedRuns, bucket_sizes, drop_on_graph_thread, on_graph_thread
from serving.engine import Engine, EngineOptions
from serving.errors import EngineError, InvalidRequest, StartupError
from tests.servers import WAIT_S


def made(folder: Path, **options: Any) -> Engine:
    model = (folder / "model.onnx").read_bytes()
    return Engine(model, read_manifest(folder), folder, EngineOptions(**options))


@pytest.fixture
def loaded(repository: Path) -> Engine:
    folder = repository / "uniform_4x8x3" / "1"
    return made(folder)


def test_runs_in_several_threads_give_the_same_answers(loaded: Engine) -> None:
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    expected = loaded.run([x])[0]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: loaded.run([x])[0], range(200)):
            np.testing.assert_array_equal(found, expected)


def test_what_onnxruntime_calls_an_invalid_argument_is_the_requests_fault(loaded: Engine) -> None:
    with pytest.raises(InvalidRequest, match="does not take these values"):
        loaded.run([np.zeros((2, 5), np.float32)])


def test_what_else_fails_in_onnxruntime_is_an_engine_error(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def run(self, *_: object) -> None:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(loaded, "_session", Failing())
    with pytest.raises(EngineError, match="onnxruntime failed: out of memory"):
        loaded.run([np.zeros((2, 4), np.float32)])


def test_both_runtimes_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: name)
    with pytest.raises(StartupError, match="both installed and overwrite each other"):
        runtime.require_onnxruntime()


def test_cuda_that_is_not_built_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(StartupError, match="provider cuda was asked for"):
        runtime.prepare("cuda")


def run_on_cpu_whatever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    make = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, sess_options, providers: make(model, sess_options, ["CPUExecutionProvider"]),
    )


def test_a_session_that_fell_back_to_another_provider_is_refused(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu without a device: the session is made, on the CPU, with only a log line."""
    folder = repository / "uniform_4x8x3" / "1"
    run_on_cpu_whatever_is_asked(monkeypatch)
    with pytest.raises(StartupError, match="no usable device"):
        made(folder, provider="cuda")


def test_the_cpu_provider_is_found() -> None:
    runtime.prepare("cpu")


def test_it_tells_on_which_provider_the_nodes_run(repository: Path, loaded: Engine) -> None:
    assert set(loaded.placement) == {"CPUExecutionProvider"}
    assert loaded.placement["CPUExecutionProvider"] > 2  # the bodies, node by node
    fused = made(repository / "uniform_4x8x3" / "1", fused=True)
    assert fused.placement == {"CPUExecutionProvider": 2}


def test_cuda_is_exact_and_captures_nothing_unless_told_to() -> None:
    name, options = runtime.execution_provider("cuda", tf32=False, graphs=False)
    assert name == "CUDAExecutionProvider"
    assert options == {"use_tf32": "0", "enable_cuda_graph": "0"}
    _, options = runtime.execution_provider("cuda", tf32=True, graphs=True)
    assert options == {"use_tf32": "1", "enable_cuda_graph": "1"}


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9))],
)
def test_buckets_are_powers_of_two_and_the_largest_batch(most: int, sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(most) == sizes


@pytest.mark.parametrize("rows", [0, 1, 3, 5, 8, 13, 14])
def test_runs_over_fixed_buffers_give_the_same_answers(
    repository: Path, loaded: Engine, rows: int
) -> None:
    """The buffers of a CUDA graph, here in the CPU's memory; what has no bucket runs as it is."""
    folder = repository / "uniform_4x8x3" / "1"
    buffered = made(folder, graph_rows=13)
    rng = np.random.default_rng(rows)
    for _ in range(2):  # the second time the buffers hold what was there before
        x = rng.normal(size=(rows, 4)).astype(np.float32)
        (found,) = buffered.run([x])
        np.testing.assert_allclose(found, loaded.run([x])[0], rtol=1e-6, atol=1e-7)


def test_an_answer_from_a_buffer_does_not_change_with_the_next(repository: Path) -> None:
    buffered = made(repository / "uniform_4x8x3" / "1", graph_rows=4)
    (first,) = buffered.run([np.zeros((3, 4), np.float32)])
    before = first.copy()
    buffered.run([np.ones((3, 4), np.float32)])
    np.testing.assert_array_equal(first, before)


def test_one_thread_alone_runs_over_fixed_buffers_and_frees_them(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is captured by one thread is not there for another, and freeing breaks a capture."""
    run_by, freed_by = set(), []
    run = BufferedRuns.run

    def noted(runs: BufferedRuns, inputs: Any) -> Any:
        run_by.add(threading.current_thread())
        return run(runs, inputs)

    monkeypatch.setattr(BufferedRuns, "run", noted)
    buffered = made(repository / "uniform_4x8x3" / "1", graph_rows=4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(buffered.run, [[np.zeros((3, 4), np.float32)]] * 20))
    (graphs,) = run_by
    weakref.finalize(buffered._session, lambda: freed_by.append(threading.current_thread()))
    del buffered
    on_graph_thread(gc.collect)
    assert freed_by == [graphs]


def test_an_engine_may_be_freed_in_the_midst_of_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the collector runs while work is being handed over, it must not wait for that."""
    freed = []

    class Freed:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            drop_on_graph_thread([])
            freed.append(self.cycle)

    begin = Future.__init__

    def begin_and_collect(future: "Future[Any]") -> None:
        begin(future)
        gc.collect()

    monkeypatch.setattr(Future, "__init__", begin_and_collect)
    Freed()
    worker = threading.Thread(target=on_graph_thread, args=(int,), daemon=True)
    worker.start()
    worker.join(WAIT_S)
    assert not worker.is_alive()
    assert freed
