"""What people see of `python -m export`: help, progress, colours, results, completion."""

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.__main__ import main
from export.arguments import examples, make_parser
from kan_model import KAN
from tests.conftest import GOLDENS, ROOT, run_export, run_module
from tests.terminals import COLOUR, on_terminal

UNIFORM = str(GOLDENS / "uniform_4x8x3.pt")
ESCAPE = "\x1b"


def test_progress_moves_and_leaves_only_finished_lines(tmp_path: Path) -> None:
    shown = on_terminal("export", UNIFORM, "--output", str(tmp_path))
    assert shown.code == 0, shown.raw
    assert shown.stdout == f"{tmp_path}/uniform_4x8x3/1\n"
    assert "\x1b[?25l" in shown.raw  # hidden while something moves,
    assert shown.raw.rindex("\x1b[?25h") > shown.raw.rindex("\x1b[?25l")  # and back
    assert COLOUR.search(shown.raw)
    lines = shown.lines
    stages = [line for line in lines if line.endswith(" s") and not line.startswith("  time")]
    assert [line.split("  ")[1] for line in stages] == [
        "read the checkpoint",
        "choose the form of each layer",
        "write model.onnx",
        "write model.ts",
        "compute the float64 reference",
        "look for NaN that a runtime loses",
        "compare the files as written",
        "replay what the server will replay",
        "hash the files",
        "write report.html",
        "publish",
    ]
    assert not any("━" in line or "⠋" in line for line in lines)


def test_tables_fit_into_80_columns(tmp_path: Path) -> None:
    shown = on_terminal("export", UNIFORM, "--output", str(tmp_path), "--activation", "silu")
    table = [line for line in shown.lines if "verdict" in line or line.rstrip().endswith("equal")]
    assert len(table) == 5
    assert max(map(len, table)) <= 80
    assert "from eager" not in table[0]


def test_a_narrow_terminal_garbles_no_line(tmp_path: Path) -> None:
    shown = on_terminal("export", UNIFORM, "--output", str(tmp_path), columns=20)
    assert shown.code == 0, shown.raw
    assert shown.stdout == f"{tmp_path}/uniform_4x8x3/1\n"
    assert "silu is ASSUMED" in " ".join(" ".join(shown.lines).split())
    assert any(line.endswith(f"{tmp_path}/uniform_4x8x3/1/report.html") for line in shown.lines)
    assert not any("⠋" in line for line in shown.lines)


def test_no_color_means_none(tmp_path: Path) -> None:
    options = ("--output", str(tmp_path))
    shown = on_terminal("export", UNIFORM, *options, environment={"NO_COLOR": "1"})
    assert shown.code == 0
    assert not COLOUR.search(shown.raw)


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    options = ("--output", str(tmp_path))
    shown = on_terminal("export", UNIFORM, *options, environment={"TERM": "dumb"})
    assert shown.code == 0
    assert ESCAPE not in shown.raw
    assert "\r" not in shown.raw
    assert "publish" in shown.raw


def test_a_terminal_without_unicode_is_written_to_in_ascii(tmp_path: Path) -> None:
    environment = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = ("--output", str(tmp_path))
    shown = on_terminal("export", UNIFORM, *options, environment=environment, new_interpreter=True)
    assert shown.code == 0
    assert shown.raw.isascii()
    assert "\\u" not in shown.raw


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}])
def test_a_log_has_no_codes_that_move(tmp_path: Path, environment: dict[str, str]) -> None:
    done = run_export(UNIFORM, "--output", tmp_path, environment=environment)
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path}/uniform_4x8x3/1\n"
    assert bool(COLOUR.search(done.stderr)) == ("FORCE_COLOR" in environment)
    assert "\x1b[?25" not in done.stderr
    assert "\x1b[2K" not in done.stderr
    if not environment:
        assert ESCAPE not in done.stderr
        table = next(line for line in done.stderr.splitlines() if "verdict" in line)
        assert "from eager" in table


class Talking(nn.Module):
    """Prints when it is built and while it runs, as some networks do."""

    def __init__(self) -> None:
        super().__init__()
        print("BUILT")
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling():  # type: ignore[attr-defined, no-untyped-call]
            print("TALK")
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("stdout_too", [False, True])
def test_what_a_factory_prints_is_shown_on_stderr_and_what_a_network_prints_is_not(
    tmp_path: Path, stdout_too: bool
) -> None:
    torch.save(Talking().state_dict(), tmp_path / "m.pt")
    network = ("--model", "tests.test_terminal:Talking", "--input-shape", "4", "--json")
    options = ("--output", str(tmp_path / "models"))
    shown = on_terminal("export", str(tmp_path / "m.pt"), *network, *options, stdout_too=stdout_too)
    assert shown.code == 0, shown.raw
    assert "BUILT" in shown.raw
    assert "TALK" not in shown.raw
    last = shown.lines[-2] if stdout_too else shown.stdout
    assert json.loads(last)["path"] == f"{tmp_path}/models/m/1"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_gives_the_terminal_back(
    tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    sent: list[signal.Signals] = []

    def stop(process: subprocess.Popen[bytes], raw: str) -> None:
        if "write model.onnx" in raw and not sent:
            sent.append(signum)
            process.send_signal(signum)

    shown = on_terminal("export", UNIFORM, "--output", str(tmp_path / "m"), interfere=stop)
    assert shown.code == code, shown.raw
    assert shown.stdout == ""
    assert shown.raw.rindex("\x1b[?25h") > shown.raw.rindex("\x1b[?25l")
    assert "Traceback" not in shown.raw
    assert list(tmp_path.iterdir()) == []


def test_quiet_tells_warnings_and_errors_alone(tmp_path: Path) -> None:
    shown = on_terminal("export", UNIFORM, "--output", str(tmp_path), "--quiet")
    assert shown.stdout == f"{tmp_path}/uniform_4x8x3/1\n"
    told = " ".join(" ".join(shown.lines).split())
    assert told.startswith("warning: the file does not say which base activation was trained")
    assert told.endswith("name it with --activation")
    options = ("--output", str(tmp_path), "--quiet", "--activation", "silu")
    assert on_terminal("export", UNIFORM, *options, new_interpreter=True).raw == ""
    refused = on_terminal("export", "none.pt", *options)
    assert refused.code == 1
    assert "error: none.pt: no such file" in refused.raw


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("torch", [UNIFORM]),
        ("rich", [UNIFORM]),
        ("onnx", [UNIFORM, "--opset", "18"]),
        ("torch", ["plot", UNIFORM, "-o", "kan.svg"]),
    ],
)
def test_what_is_not_installed_is_told(module: str, words: list[str]) -> None:
    hidden = f"import sys; sys.modules[{module!r}] = None; from export.__main__ import main;"
    command = [sys.executable, "-c", f"{hidden} sys.exit(main())", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    expected = (
        rf"error: {module}[.\w]* is not installed; .*pip install '\.\[export\]' in its checkout\n"
    )
    assert re.fullmatch(expected, done.stderr)


def test_help_comes_without_torch() -> None:
    script = (
        "import sys, export.__main__, export.arguments; export.arguments.make_parser();"
        "sys.exit(' '.join({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_fits_into_80_columns_and_names_every_flag() -> None:
    done = run_export("--help", environment={"COLUMNS": "80"})
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    for action in make_parser()._actions:
        assert all(flag in done.stdout for flag in action.option_strings)
    assert ESCAPE not in done.stdout


COMMANDS = [
    line.strip().partition("  ")[0]
    for line in examples("kan-export").splitlines()
    if line.startswith("  kan-export")
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the examples of --help name."""
    torch.manual_seed(0)
    kan = KAN([4, 6, 3])
    state = kan.state_dict()
    (tmp_path / "runs").mkdir()
    torch.save(state, tmp_path / "model.pt")
    torch.save(state, tmp_path / "runs" / "best.pt")
    both = {f"{prefix}{key}": value for prefix in ("ema.", "raw.") for key, value in state.items()}
    torch.save(both, tmp_path / "last.ckpt")
    x = np.random.default_rng(0).uniform(-1, 1, (40, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    y = kan(torch.from_numpy(x)).detach().numpy()
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "labels.npy", y.argmax(axis=1))
    (tmp_path / "nets.py").write_text(
        "from torch import nn\nfrom kan_model import KAN\n\n\n"
        "def build():\n    return nn.Sequential(nn.Flatten(), KAN([192, 4]))\n"
    )
    torch.save(nn.Sequential(nn.Flatten(), KAN([192, 4])).state_dict(), tmp_path / "head.pt")
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem"],
        cwd=tmp_path,
        check=True,
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_there_are_examples() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_help_run(
    command: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)
    out = capsys.readouterr().out
    if " plot " in command:
        assert (workplace / out.strip()).stat().st_size > 1000
    elif "inspect" in command:
        assert "export takes it" in out
    elif "--json" in command:
        assert (workplace / json.loads(out)["path"] / "manifest.json").is_file()
    else:
        assert (workplace / out.strip() / "manifest.json").is_file()


# Completion.

PROGRAMS = {"kan-export": "export", "kan-client": "serving.client", "kan-serve": "serving"}


@lru_cache
def script_of(program: str, shell: str) -> str:
    pytest.importorskip("shtab", reason="writes the scripts; install kanserve's extra export")
    done = run_module(PROGRAMS[program], "--print-completion", shell)
    assert done.returncode == 0, done.stderr
    return done.stdout


def completed(script: Path, line: str, until: str) -> str:
    """Type a line and a tab into a real bash, and wait for something to appear."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(script.parent)
        os.environ |= {"TERM": "dumb", "PS1": "$ ", "INPUTRC": "/dev/null"}
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    shown = ""
    try:
        settings = ("enable-bracketed-paste off", "show-all-if-ambiguous on")
        commands = " ".join(f"bind 'set {setting}';" for setting in settings)
        os.write(terminal, f"{commands} source {script.name}; echo RE''ADY\n".encode())
        deadline, typed = time.monotonic() + 60, False
        while time.monotonic() < deadline and not (typed and until in shown):
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 65536).decode(errors="replace")
            if "READY" in shown and not typed:
                shown, typed = "", True
                os.write(terminal, f"{line}\t".encode())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    return shown


@pytest.mark.parametrize(
    ("program", "typed", "appears"),
    [
        ("kan-export", "kan-export --prec", "--precision"),
        ("kan-export", "kan-export model.pt --precision i", "int8"),
        ("kan-export", "kan-export --sig", "--sign-password-file"),
        ("kan-export", "kan-export --samples ro", "rows.npy"),
        ("kan-export", "kan-export mod", "model.pt"),
        ("kan-client", "kan-client be", "bench"),
        ("kan-client", "kan-client infer --out", "--output-tensor"),
        ("kan-client", "kan-client infer --input ro", "rows.npy"),
        ("kan-serve", "kan-serve --model-rep", "--model-repository"),
        ("kan-serve", "kan-serve --fused o", "off"),
    ],
)
def test_bash_completes(tmp_path: Path, program: str, typed: str, appears: str) -> None:
    script = tmp_path / "completion"
    script.write_text(script_of(program, "bash"))
    (tmp_path / "rows.npy").touch()
    (tmp_path / "model.pt").touch()
    assert appears in completed(script, typed, appears)


@pytest.mark.parametrize("program", PROGRAMS)
def test_zsh_reads_its_script(tmp_path: Path, program: str) -> None:
    text = script_of(program, "zsh")
    assert text.startswith(f"#compdef {program}\n")
    if not shutil.which("zsh"):
        pytest.skip("no zsh to read it; apt-get install zsh")
    (tmp_path / "script").write_text(text)
    subprocess.run(["zsh", "-n", tmp_path / "script"], check=True)


@pytest.mark.parametrize(
    ("program", "typed", "appears"),
    [
        ("kan-export", "kan-export --prec", "--precision"),
        ("kan-client", "kan-client infer --out", "--output-tensor"),
        ("kan-serve", "kan-serve --model-rep", "--model-repository"),
    ],
)
def test_fish_completes(tmp_path: Path, program: str, typed: str, appears: str) -> None:
    text = script_of(program, "fish")
    assert f"complete -c {program}" in text
    if not shutil.which("fish"):
        pytest.skip("no fish to complete in; apt-get install fish")
    (tmp_path / "script").write_text(text)
    line = f"source {tmp_path}/script; complete -C '{typed}'"
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(
        ["fish", "-c", line], env=environment, check=True, capture_output=True, text=True
    )
    assert appears in done.stdout


def test_the_shell_may_follow_an_equals_sign_and_nothing_may_follow_the_shell() -> None:
    pytest.importorskip("shtab", reason="writes the scripts; install kanserve's extra export")
    done = run_module("serving", "--print-completion=bash")
    assert (done.returncode, done.stdout) == (0, script_of("kan-serve", "bash"))
    done = run_module("serving", "--print-completion", "ba", "sh")
    assert done.returncode == 2
    assert "expected bash, zsh, fish, found 'ba sh'" in done.stderr


def test_completion_for_another_shell_is_refused() -> None:
    for module in PROGRAMS.values():
        done = run_module(module, "--print-completion", "tcsh")
        assert done.returncode == 2
        assert "tcsh" in done.stderr
        assert done.stdout == ""
