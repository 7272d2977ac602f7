"""A command on a terminal, as people have it: stderr is one, stdout a pipe or the terminal too."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests import forkserver
from tests.conftest import ROOT

_DEADLINE_S = 120.0
_ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|4[0-7]|38;|48;)[\d;]*m")
"""Of the foreground or the background; bold and dim are none."""


@dataclass(frozen=True)
class Shown:
    """What a command left.

    Attributes:
        code: Its exit code.
        stdout: What a pipe got; empty if the terminal was stdout as well.
        raw: Everything that the terminal got.
    """

    code: int
    stdout: str
    raw: str

    @property
    def lines(self) -> list[str]:
        """What stays on the screen: what is written over, or erased, is gone."""
        kept: list[str] = []
        row = 0
        for part in re.split(r"(\x1b\[\d*A|\x1b\[2K|\r|\n)", self.raw):
            if part == "\n":
                row += 1
            elif part.endswith("A") and part.startswith("\x1b["):
                row -= int(part[2:-1] or 1)
            elif part == "\x1b[2K":
                kept[row] = ""
            else:
                text = _ESCAPE.sub("", part).replace("\r", "")
                while len(kept) <= row:
                    kept.append("")
                kept[row] += text
        return kept


def on_terminal(
    *command: str,
    columns: int = 80,
    environment: dict[str, str] | None = None,
    stdout_too: bool = False,
    new_interpreter: bool = False,
    interfere: Callable[[subprocess.Popen[bytes], str], None] = lambda process, raw: None,
) -> Shown:
    """Run `python -m COMMAND` with a terminal for stderr.

    Args:
        command: Module and arguments.
        columns: Width of the terminal.
        environment: Further variables.
        stdout_too: Whether stdout is the terminal, or a pipe.
        new_interpreter: Whether to start one, or to fork a warm process (forkserver.py).
        interfere: Is given the process and what the terminal has got, whenever that grows.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
    without = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI"}
    inherited = {key: value for key, value in os.environ.items() if key not in without}
    words = ("-m", *command)
    process = subprocess.Popen(
        [sys.executable, *words] if new_interpreter else forkserver.command(*words),
        cwd=ROOT,
        env=inherited | {"TERM": "xterm-256color", "LANG": "C.UTF-8"} | (environment or {}),
        stdin=theirs,
        stdout=theirs if stdout_too else subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    raw = b""
    until = time.monotonic() + _DEADLINE_S
    with process:
        try:
            while time.monotonic() < until:
                if not select.select([ours], [], [], 1.0)[0]:
                    continue
                try:
                    more = os.read(ours, 65536)
                except OSError:  # the other end is closed
                    break
                if not more:
                    break
                raw += more
                interfere(process, raw.decode(errors="replace"))
            stdout = b"" if process.stdout is None else process.stdout.read()
            code = process.wait(timeout=_DEADLINE_S)
        finally:
            process.kill()
            os.close(ours)
    return Shown(code, stdout.decode(), raw.decode(errors="replace").replace("\r\n", "\n"))
