"""How the project's commands are written here: by their names where they are installed.

Installed means that a command lies beside the interpreter, or on PATH. In a checkout without an
installation it is `python -m PACKAGE`.
"""

import shlex
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Literal

Command = Literal["kan-export", "kan-serve", "kan-client"]

_PACKAGES: dict[Command, str] = {
    "kan-export": "export",
    "kan-serve": "serving",
    "kan-client": "serving.client",
}


@cache
def name_of(command: Command) -> str:
    """Name a command, for help and messages."""
    installed = _beside(command) is not None or shutil.which(command) is not None
    return command if installed else f"python -m {_PACKAGES[command]}"


def runnable(command: Command) -> str:
    """Write a command as a shell in the current folder runs it, quoted where it must be."""
    beside, on_path = _beside(command), shutil.which(command)
    if beside is not None and not _same(beside, on_path):
        return shlex.quote(str(beside))
    if on_path is not None:
        return command
    return f"{python()} -m {_PACKAGES[command]}"


def python() -> str:
    """Write this interpreter as a shell runs it."""
    found = shutil.which("python")
    if found is not None and Path(found).absolute() == Path(sys.executable).absolute():
        return "python"
    return shlex.quote(sys.executable)


def spell(text: str) -> str:
    """Write the commands in a text as `name_of` does."""
    for command in _PACKAGES:
        text = text.replace(command, name_of(command))
    return text


def _beside(command: Command) -> Path | None:
    path = Path(sys.executable).parent / command
    return path if path.is_file() else None


def _same(path: Path, found: str | None) -> bool:
    return found is not None and Path(found).absolute() == path.absolute()
