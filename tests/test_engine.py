from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from kan_bundle.manifest import read_manifest
from serving import runtime
from serving.engine import Engine
from serving.errors import EngineError, InvalidRequest, StartupError


@pytest.fixture
def loaded(repository: Path) -> Engine:
    folder = repository / "uniform_4x8x3" / "1"
    return Engine(
        (folder / "model.onnx").read_bytes(), read_manifest(folder), folder, "cpu", threads=1
    )


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


def test_a_session_that_fell_back_to_another_provider_is_refused(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu without a device: the session is made, on the CPU, with only a log line."""
    folder = repository / "uniform_4x8x3" / "1"
    make = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, sess_options, providers: make(model, sess_options, ["CPUExecutionProvider"]),
    )
    with pytest.raises(StartupError, match="no usable device"):
        Engine(
            (folder / "model.onnx").read_bytes(), read_manifest(folder), folder, "cuda", threads=1
        )


def test_the_cpu_provider_is_found() -> None:
    runtime.prepare("cpu")
