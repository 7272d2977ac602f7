"""The Dockerfile, as far as it can be judged unbuilt; tests/containers builds and runs it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from kan_bundle import __version__
from tests.conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert hadolint is not None
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_its_version_is_the_packages() -> None:
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE


def test_every_target_that_is_run_ends_as_the_unprivileged_user() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    for target in ("cpu", "cuda", "export"):
        (stage,) = [one for one in stages if one.partition("\n")[0].endswith(f" AS {target}")]
        users = re.findall(r"^USER (.*)$", stage, re.MULTILINE)
        assert users == ["10001:10001"], target


def test_what_is_copied_is_let_into_the_build_and_nothing_else_is() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.strip("!/") for line in lines if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert "*" in lines
    assert {source for sources in copies for source in sources.split()} == allowed
    assert allowed <= {path.name for path in ROOT.iterdir()}
