"""What is installed, and from where: pins, hashes, indexes, base images."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

LOCKS = ROOT / "locks"
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
TOOLS = ("cmake", "ninja", "scikit-build-core")
# Per lock, the extras and the packages beside them that it has; as in the Makefile.
CONTENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "build": ((), TOOLS),
    "cpu": (("", "cpu", "otel"), ("cryptography",)),
    "cuda": (("", "gpu", "otel"), ("cryptography",)),
    "export": (("", "cpu", "export", "signing"), ()),
    "dev": (("", "cpu", "export", "signing", "otel", "examples", "docs", "dev"), TOOLS),
    "benchmarks": (("", "benchmarks"), ()),
}
BY_VERSION = {"torch"}  # its builds for CPUs alone have other hashes, and an index of their own


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def lock(name: str) -> str:
    return (LOCKS / f"{name}.txt").read_text()


def project() -> dict[str, list[Requirement]]:
    """The package's requirements by extra; its own are those of the extra ''."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = found["optional-dependencies"] | {"": found["dependencies"]}
    return {extra: [Requirement(one) for one in each] for extra, each in listed.items()}


def test_every_lock_is_known() -> None:
    assert {path.stem for path in LOCKS.iterdir()} == set(CONTENTS)
    makefile = (ROOT / "Makefile").read_text()
    for name in CONTENTS:
        assert f"build/locks/{name}.txt" in makefile


@pytest.mark.parametrize("name", CONTENTS)
def test_every_package_in_a_lock_has_a_version_and_hashes(name: str) -> None:
    lines = [line for line in lock(name).splitlines() if not line.startswith("#")]
    blocks = re.split(r"\n(?=\S)", "\n".join(lines))
    assert len(blocks) == len(pins(lock(name)))
    for block in blocks:
        assert HASH.search(block), block
        assert re.match(r"[A-Za-z0-9._-]+(\[[^]]*\])?==", block), block
        words = re.split(r"\s+", HASH.sub("", block).replace("\\", " "))
        assert not [word for word in words if word.startswith("--")], block  # no index, no option


@pytest.mark.parametrize("name", CONTENTS)
def test_a_lock_has_what_the_package_asks_for(name: str) -> None:
    extras, others = CONTENTS[name]
    locked = pins(lock(name))
    assert {canonicalize_name(other) for other in others} <= set(locked)
    for requirement in (one for extra in extras for one in project()[extra]):
        package = canonicalize_name(requirement.name)
        if package not in BY_VERSION:
            assert requirement.specifier.contains(locked[package], prereleases=True), requirement


@pytest.mark.parametrize("name", CONTENTS)
def test_a_lock_has_the_versions_of_constraints(name: str) -> None:
    chosen = pins((ROOT / "constraints.txt").read_text())
    if name == "cuda":
        chosen |= pins((ROOT / "constraints-cuda.txt").read_text())
    for package, version in pins(lock(name)).items():
        assert chosen.get(package, version) == version, f"{package}: run make lock"
    assert set(pins(lock(name))) <= set(chosen) or name == "cuda"


def installs(text: str) -> list[str]:
    """Every command that has pip install something, on one line each."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return re.findall(r"pip\S*(?: --python \S+)? (?:install|wheel|download) ([^&\n]*)", joined)


def test_images_have_nothing_but_files_of_known_hashes_and_torch() -> None:
    commands = installs((ROOT / "Dockerfile").read_text())
    assert len(commands) == 9
    for command in commands:
        if command.split()[-1] == "torch":
            assert "--constraint constraints.txt" in command
            continue
        assert "--no-deps" in command, command
        local = "--no-index wheels/*.whl" in command or "--wheel-dir wheels ." in command
        assert local or "--require-hashes" in command, command


def test_no_index_stands_beside_another() -> None:
    """Where two are asked, each can offer any package of the other, in a higher version."""
    for path in ("Dockerfile", "Makefile", "pyproject.toml", ".ci/run", "constraints.txt",
                 "constraints-cuda.txt", *(f"locks/{name}.txt" for name in CONTENTS),
                 *(str(p.relative_to(ROOT)) for p in (ROOT / "tests/environments").glob("*.txt")),
                 *(str(p.relative_to(ROOT)) for p in ROOT.glob("*.md")),
                 *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))):  # fmt: skip
        assert "extra-index" not in (ROOT / path).read_text(), path


def test_the_environment_of_the_tests_has_nothing_but_files_of_known_hashes_and_torch() -> None:
    makefile = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^\$\(VENV\)/\w+:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    commands = [command for rule in rules for command in installs(rule)]
    assert len(commands) == 4
    for command in commands:
        unlocked = command.endswith("--constraint constraints.txt torch")
        own = command.endswith("--no-deps --no-build-isolation --editable .")
        assert unlocked or own or "--no-deps --require-hashes --requirement locks/" in command


DIGEST = "sha256:" + "0123456789abcdef" * 4


def pin(folder: Path, answer: str) -> subprocess.CompletedProcess[str]:
    """Pin copies of the files, where the registry's answer is known."""
    skopeo = folder / "skopeo"
    skopeo.write_text(f"#!/bin/sh\n{answer}\n")
    skopeo.chmod(0o755)
    for path in ("Dockerfile", "deploy/compose.yaml"):
        if not (folder / Path(path).name).exists():
            shutil.copy(ROOT / path, folder)
    files = [ROOT / "deploy/pin_images.sh", folder / "Dockerfile", folder / "compose.yaml"]
    command = ["sh", *map(str, files)]
    path_variable = f"{folder}:/usr/local/bin:/usr/bin:/bin"
    return subprocess.run(command, env={"PATH": path_variable}, capture_output=True, text=True)


def test_images_are_pinned_by_the_digests_that_the_registry_gives(tmp_path: Path) -> None:
    other = DIGEST.replace("0123", "3210")
    for digest in (DIGEST, other):  # the second time they are renewed
        done = pin(tmp_path, f"echo {digest}")
        assert done.returncode == 0, done.stderr
        text = "".join((tmp_path / name).read_text() for name in ("Dockerfile", "compose.yaml"))
        images = re.findall(r"docker\.io/\S+?:[\w.-]+(?:@[\w:]+)?(?=[\s}]|$)", text)
        assert len(images) == 3
        assert all(image.endswith(f"@{digest}") for image in images), images
        assert text.count("@sha256:") == 3


@pytest.mark.parametrize("answer", ["exit 1", "echo", "echo sha256:12", "echo '#'"])
def test_without_a_digest_nothing_is_changed(tmp_path: Path, answer: str) -> None:
    done = pin(tmp_path, answer)
    assert done.returncode == 1
    assert "nothing was changed" in done.stderr
    for path in ("Dockerfile", "deploy/compose.yaml"):
        assert (tmp_path / Path(path).name).read_bytes() == (ROOT / path).read_bytes()


def test_images_are_named_by_digest() -> None:
    for file, images in (("Dockerfile", 1), ("deploy/compose.yaml", 2)):
        text = (ROOT / file).read_text()
        assert len(re.findall(r"docker\.io/\S+:[\w.-]+@sha256:[0-9a-f]{64}\b", text)) == images
        assert len(re.findall(r"docker\.io/", text)) == images
