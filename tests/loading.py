"""Loading a bundle as the server does."""

from pathlib import Path

import onnxruntime
import pytest

from kan_bundle.manifest import Manifest
from serving.batching import Limits
from serving.engine import Engine, EngineOptions

LIMITS = Limits(1024, 0.0, 2**20, 2**30)


def make_engine(model: bytes, manifest: Manifest, folder: Path, *, fused: bool = True) -> Engine:
    return Engine(model, manifest, folder, EngineOptions(fused=fused))


@pytest.fixture
def unreached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if onnxruntime is given anything."""

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("onnxruntime was reached")

    monkeypatch.setattr(onnxruntime, "InferenceSession", reached)
