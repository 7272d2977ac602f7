"""The documentation is run: every command and program of its pages, and what it should name."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from export import export_checkpoint
from export.__main__ import main as export_main
from kan_model import KAN
from serving.server import Server
from serving.settings import Settings
from tests.conftest import ROOT, Shared
from tests.pages import PAGES, Block, commands, read_blocks
from tests.ports import free_port
from tests.test_tritonclient import PYTHON as TRITONCLIENT

BLOCKS = {str(page.relative_to(ROOT)): read_blocks(page) for page in PAGES}
ALL = [block for blocks in BLOCKS.values() for block in blocks]
RUN = [page for page, blocks in BLOCKS.items() if any(block.is_run for block in blocks)]
SHELL = (ROOT / "tests" / "page_shell.sh").read_text()
BIN = Path(sys.executable).parent
TIMEOUT_S = 300

# What a page finds where its reader is: a model that was exported, a server of it.
EXPORTED = ("docs/operator.md", "docs/settings.md", "docs/security.md")
SERVED = ("docs/client.md", "docs/containers.md", "docs/operating.md")

NOT_RUN = {
    "installs packages": 5,
    "takes minutes": 2,
    "needs a container engine": 2,
    "needs another project": 1,
    "needs Kubernetes": 3,
    "needs MLServer": 1,
    "needs TorchServe": 1,
    "needs Triton": 1,
}
"""How many fences are not run, by the reason that they give."""


@dataclass(frozen=True)
class Reader:
    """Whoever follows a page: in a folder, with ports that nobody else has."""

    folder: Path
    ports: dict[str, int]

    def with_addresses(self, text: str) -> str:
        text = text.replace("HOST:", "127.0.0.1:")
        for port, free in self.ports.items():
            text = re.sub(rf"\b{port}\b", str(free), text)
        return text

    def run_shell(self, block: Block) -> None:
        """Run a block. Exports are run in this process: to import torch takes longer than they do.

        Except those of the README, which are run as they are.
        """
        if block.page == "README.md":
            self._run_bash(block.place, block.text)
            return
        for is_export, lines in groupby(block.text.splitlines(True), _is_export):
            if not is_export:
                self._run_bash(block.place, "".join(lines))
                continue
            for line in lines:
                handler = signal.getsignal(signal.SIGTERM)
                code = export_main(shlex.split(line, comments=True)[3:])
                signal.signal(signal.SIGTERM, handler)
                assert code == 0, f"{block.place}: {line}"

    def _run_bash(self, place: str, text: str) -> None:
        environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",  # the same for what it starts
            "HERE": str(self.folder.parent),
            "KANSERVE_GRPC_PORT": str(self.ports["8001"]),
            "KANSERVE_METRICS_PORT": str(self.ports["8002"]),
        }
        output = self.folder.parent / "output"
        with output.open("w") as file:  # not a pipe, which a server would keep open
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", SHELL + self.with_addresses(text)],
                cwd=self.folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=TIMEOUT_S,
            )
        assert done.returncode == 0, f"{place}\n{text}\n{output.read_text()}"

    def run_python(self, block: Block, names: dict[str, Any]) -> None:
        text = self.with_addresses(block.text)
        if "tritonclient" in text:  # its versions clash with ours
            assert TRITONCLIENT.exists(), "run `make test`, which makes the environment"
            subprocess.run([TRITONCLIENT, "-c", text], check=True, timeout=TIMEOUT_S)
            return
        code = compile("\n" * (block.line - 1) + text, str(ROOT / block.page), "exec")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other libraries; ours are errors elsewhere
            exec(code, names)


def _is_export(line: str) -> bool:
    return line.startswith("python -m export ")


@pytest.fixture(scope="module")
def belongings(shared: Shared) -> Path:
    """A reader's own: a checkpoint, rows, and the model exported from it."""
    return shared("reader", _make_belongings)


def _make_belongings(folder: Path) -> None:
    torch.manual_seed(0)
    torch.save(KAN([64, 64, 10]).state_dict(), folder / "model.pt")
    rows = np.random.default_rng(0).uniform(-1, 1, (16, 64))
    np.save(folder / "x.npy", rows.astype(np.float32))
    (folder / "row.json").write_text(json.dumps(rows[0].tolist()))
    export_checkpoint(folder / "model.pt", output=folder / "models", activation="silu")


@pytest.fixture
def reader(
    request: pytest.FixtureRequest,
    belongings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Reader]:
    """A reader of a page, in a folder of their own."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("model.pt", "x.npy", "row.json"):
        shutil.copy(belongings / name, folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    known = set(sys.modules)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # there are as many tests as processors
    yield Reader(folder, {named: free_port() for named in ("8001", "8002")})
    torch.set_num_threads(threads)
    if (tmp_path / "server.pid").exists():
        os.kill(int((tmp_path / "server.pid").read_text()), 9)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.mark.parametrize("page", RUN)
def test_what_a_page_says_can_be_done(page: str, reader: Reader, belongings: Path) -> None:
    for program in ("curl", "openssl"):
        used = any(program in words for b in BLOCKS[page] if b.is_run for words in commands(b))
        if used and shutil.which(program) is None:
            pytest.skip(f"no {program} on this machine (Debian: apt-get install {program})")
    if page in (*EXPORTED, *SERVED):
        shutil.copytree(belongings / "models", reader.folder / "models")
    if page in SERVED:
        reader.run_shell(
            Block(page, 0, "sh", None, None, "python -m serving --model-repository models")
        )
    names: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS[page]:
        if block.title is not None:
            (reader.folder / block.title).write_text(block.text)
        elif block.is_run and block.language == "sh":
            reader.run_shell(block)
        elif block.is_run:
            reader.run_python(block, names)


def test_what_is_not_run_is_known_by_its_reason() -> None:
    marked = Counter(block.not_run for block in ALL if block.not_run is not None)
    assert marked == NOT_RUN


def test_files_of_the_pages_can_be_read() -> None:
    read = {"json": json.loads, "toml": tomllib.loads}
    found = [block for block in ALL if block.language in read]
    assert found
    for block in found:
        read[block.language](block.text)


def test_every_target_of_make_is_there() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    text = "\n".join(page.read_text() for page in (*PAGES, ROOT / "CONTRIBUTING.md"))
    named = set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", text))
    assert len(named) > 5
    assert named <= targets


def test_every_flag_of_a_server_that_is_started_is_known() -> None:
    known = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    for block in ALL:
        if block.language == "sh":
            for words in commands(block):
                if words[:3] == ["python", "-m", "serving"] or words[0] == "kan-serve":
                    flags = {w.partition("=")[0] for w in words if w.startswith("--")}
                    assert flags <= known, block.place


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "serving"),
        ("-m", "export"),
        *(("-m", "serving.client", name) for name in ("infer", "models", "bench", "health")),
    ],
    ids=lambda words: " ".join(words[1:]),
)
def test_every_flag_of_a_command_is_explained(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        env=os.environ | {"COLUMNS": "500"},  # no flag is parted
        capture_output=True,
        text=True,
        check=True,
    )
    known = set(re.findall(r"(?<![\w-])--(?!help|no-)[a-z][a-z0-9-]*", done.stdout))
    text = "\n".join(page.read_text() for page in PAGES)
    told = set(re.findall(r"`(--[a-z][a-z0-9-]*)", text))
    assert known
    assert known - told == set()


def test_every_setting_is_explained_with_its_variable() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    for name in Settings.model_fields:
        flag = f"--{name.replace('_', '-')}"
        assert f"`{flag}" in text, flag
        if name != "print_config":
            assert f"`KANSERVE_{name.upper()}`" in text, name


def test_every_metric_is_explained(server: Server) -> None:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    named = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in families
        if family.name.startswith("kanserve_")
    }
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert len(named) > 10
    assert named - set(re.findall(r"`(kanserve_[a-z_]+)", text)) == set()


def test_every_module_is_named_once() -> None:
    text = (ROOT / "docs" / "files.md").read_text()
    linked = Counter(re.findall(r"\]\(\.\./([^)#]+)\)", text))
    packages = ("export", "kan_bundle", "kan_model", "kan_ops", "protos", "serving")
    modules = [
        str(path.relative_to(ROOT))
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
        if "_pb2" not in path.name
    ]
    assert len(modules) > 80
    missing = [name for name in modules if linked[name] != 1]
    assert missing == []


def test_links_lead_to_files_that_are_there() -> None:
    beside = [ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")]
    for page in (*PAGES, *beside):
        for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text()):
            assert ":" in link or (page.parent / link).exists(), f"{page.name}: {link}"
