"""What the server's image holds, seen from outside and from inside."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kan_bundle import __version__
from tests.conftest import ROOT
from tests.containers.engine import run

pytestmark = pytest.mark.container

ADDS_AT_MOST = 250e6  # bytes
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "cpp", "as", "ld", "cmake", "ninja", "make")


@pytest.fixture(scope="module")
def root(cpu_image: str) -> Iterator[Path]:
    """The files of the image."""
    yield Path(run("podman", "image", "mount", cpu_image))
    run("podman", "image", "unmount", cpu_image)


def size(image: str) -> int:
    return int(run("podman", "image", "inspect", "--format", "{{.Size}}", image))


def inside(image: str, script: str) -> str:
    """Run Python in the image, as whom it runs."""
    return run("podman", "run", "--rm", "--entrypoint", "python", image, "-c", script)


def test_it_adds_less_than_250_mb_to_its_base(base_image: str, cpu_image: str) -> None:
    added = size(cpu_image) - size(base_image)
    print(f"the image adds {added / 1e6:.0f} MB to its base of {size(base_image) / 1e6:.0f} MB")
    assert added < ADDS_AT_MOST


def test_it_is_not_run_as_root(cpu_image: str) -> None:
    config = json.loads(run("podman", "image", "inspect", cpu_image))[0]["Config"]
    assert config["User"] == "10001:10001"
    assert inside(cpu_image, "import os; print(os.getresuid(), os.getresgid())") == (
        "(10001, 10001, 10001) (10001, 10001, 10001)"
    )


def test_there_is_no_torch_no_compiler_and_no_cache_of_pip_in_it(root: Path) -> None:
    names = {path.name for path in root.glob("opt/kanserve/lib/python3*/site-packages/*")}
    assert {"serving", "kan_ops", "onnxruntime", "grpc"} <= names
    assert not {"torch", "onnx", "onnxscript", "pip", "scikit_build_core"} & names
    for folder in ("bin", "usr/bin", "usr/local/bin", "opt/kanserve/bin"):
        assert (root / folder).is_dir()
        assert [name for name in COMPILERS if (root / folder / name).exists()] == []
    assert not list(root.glob("usr/lib/gcc/*/*/cc1*"))
    for cache in (
        "root/.cache",
        "tmp/.cache",
        "opt/kanserve/.cache",
        "build",
        "var/lib/apt/lists/*",
    ):
        assert not list(root.glob(cache)), cache


def test_what_it_holds_is_what_constraints_txt_pins(cpu_image: str) -> None:
    pins = re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {normal(name): version for name, version in pins}
    script = (
        "import importlib.metadata, json, sysconfig;"
        "found = importlib.metadata.distributions(path=[sysconfig.get_path('purelib')]);"
        "print(json.dumps({one.name: one.version for one in found}))"
    )
    found = json.loads(inside(cpu_image, script))
    assert found.pop("kanserve") == __version__
    assert "onnxruntime" in found
    assert {name: pinned.get(normal(name)) for name in found} == found


def normal(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_operators_library_is_in_it_and_loads(cpu_image: str) -> None:
    script = "import kan_ops, onnxruntime; kan_ops.register(onnxruntime.SessionOptions())"
    inside(cpu_image, script)


def test_labels_say_what_it_is(cpu_image: str) -> None:
    labels = json.loads(run("podman", "image", "inspect", cpu_image))[0]["Labels"]
    said = {name.removeprefix("org.opencontainers.image."): v for name, v in labels.items()}
    assert said["title"] == "kanserve"
    assert said["version"] == __version__
    assert said["licenses"] == "MIT"


@pytest.mark.parametrize(
    "module", ["serving.server", "serving.supervisor.server", "serving.client.health"]
)
def test_nothing_is_compiled_when_it_starts(cpu_image: str, module: str) -> None:
    script = (
        f"import sys, os, {module};"
        "print([m for m in sys.modules.values() if (c := getattr(m, '__cached__', None))"
        "       and not os.path.exists(c)])"
    )
    assert inside(cpu_image, script) == "[]"
