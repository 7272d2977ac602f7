"""A fork of the warm process against the oracle: a new interpreter with the same words."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver
from tests.conftest import ROOT

FACTS = """
import codecs, json, os, signal, sys, threading, warnings
streams = {
    name: (codecs.lookup(s.encoding).name, s.errors, s.line_buffering, s.isatty())
    for name in ("stdin", "stdout", "stderr") if (s := getattr(sys, name)) is not None
}
shown = []
for category in (UserWarning, DeprecationWarning, ResourceWarning, RuntimeWarning):
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn("w", category)
        shown.append(len(caught))
    except Warning as error:
        shown.append(type(error).__name__)
print(json.dumps({
    "argv": sys.argv, "name": __name__, "path": sys.path, "streams": streams,
    "warnoptions": sys.warnoptions, "warned": shown, "cwd": os.getcwd(),
    "environment": dict(os.environ), "threads": threading.active_count(),
    "signals": [str(signal.getsignal(s)) for s in (2, 15, 1, 13)],
    "command": "export.__main__" in sys.modules, "executable": sys.executable,
}, indent=1))
"""


def both(folder: Path, *words: str, **options: Any) -> list[subprocess.CompletedProcess[str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("environment", {})
    return [
        subprocess.run(
            command, cwd=folder, env=environment, text=True, timeout=120, **options
        )
        for command in (forkserver.command(*words), [sys.executable, *words])
    ]  # fmt: skip


@pytest.mark.parametrize("environment", [{}, {"PYTHONIOENCODING": "latin-1:replace"}, {"A": "ü"}])
@pytest.mark.parametrize("flags", [(), ("-W", "error")])
@pytest.mark.parametrize("form", [("-m", "facts"), ("facts.py",), ("-c", FACTS)])
def test_a_fork_finds_what_a_new_interpreter_finds(
    tmp_path: Path, form: tuple[str, ...], flags: tuple[str, ...], environment: dict[str, str]
) -> None:
    (tmp_path / "facts.py").write_text(FACTS)
    fork, new = both(
        tmp_path, *flags, *form, "a", "-b", environment=environment, capture_output=True
    )
    assert json.loads(fork.stdout) == json.loads(new.stdout)
    assert (fork.stderr, fork.returncode) == (new.stderr, 0)


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "import sys; sys.exit(3)",
        "import sys; sys.exit(-1)",
        "import sys; sys.exit('a reason')",
        "import os; os._exit(7)",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.kill(os.getpid(), 15)",
        "import atexit; atexit.register(print, 'last'); print('first')",
        "import threading, time; threading.Timer(0.1, print, ['later']).start()",
        "import sys; print('to stderr', file=sys.stderr); print('é', end='')",
        "import sys; sys.stdin.read() == 'given' or sys.exit(1)",
    ],
)
def test_it_ends_alike(tmp_path: Path, code: str) -> None:
    fork, new = both(tmp_path, "-c", code, capture_output=True, input="given")
    assert (fork.returncode, fork.stdout, fork.stderr) == (new.returncode, new.stdout, new.stderr)


def test_an_error_is_a_traceback(tmp_path: Path) -> None:
    fork, new = both(tmp_path, "-c", "1 / 0", capture_output=True)
    assert fork.returncode == new.returncode == 1
    start, end = fork.stderr.splitlines()[0], fork.stderr.splitlines()[-1]
    assert [start, end] == [new.stderr.splitlines()[0], new.stderr.splitlines()[-1]]


@pytest.mark.parametrize("closed", ["a full disk", "a closed pipe", "nothing"])
def test_a_stdout_that_cannot_be_written_fails_alike(tmp_path: Path, closed: str) -> None:
    """Also where it is noticed by the interpreter alone, at its end."""
    if closed == "a full disk":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    options: dict[str, Any] = {"stdout": stdout, "stderr": subprocess.PIPE}
    if closed == "nothing":
        options["preexec_fn"] = lambda: os.close(1)
    fork, new = both(tmp_path, "-c", "print('written')", **options)
    os.close(stdout)
    assert fork.returncode == new.returncode
    assert fork.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_it(signum: signal.Signals) -> None:
    code = "import time; print('runs', flush=True); time.sleep(60)"
    command = forkserver.command("-c", code)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdout is not None
        assert client.stdout.readline()
        client.send_signal(signum)
        assert client.wait(timeout=60) == -signum
        assert client.stdout.read() == b""  # the fork has closed it: it has ended, too


def test_a_variable_that_only_a_new_interpreter_follows_is_refused(tmp_path: Path) -> None:
    fork = both(tmp_path, "-c", "pass", environment={"PYTHONUTF8": "0"}, capture_output=True)[0]
    assert fork.returncode == 1
    assert fork.stderr == "PYTHONUTF8: only a new interpreter follows it, start one\n"
