"""Faults of files in a server's processes. Python imports this at start if it is on PYTHONPATH.

FAULTY_FILES names a JSON file, a list of rules. The first rule whose `suffix` ends the path of a
file that is opened by `os.open`, as the files of bundles are, says what happens: `error` (the name
of an errno, or MemoryError), or `until` (the file whose existence ends a wait). With `pid` it holds
for that process alone. A process that multiprocessing forks counts as a file named `fork`, and one
that it starts as `exec`.
"""

import _posixsubprocess
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

_RULES = os.environ.get("FAULTY_FILES")
_open = os.open
_fork, _fork_exec = os.fork, _posixsubprocess.fork_exec


def _apply_rules(path: str) -> None:
    assert _RULES is not None
    rules = _open(_RULES, os.O_RDONLY)
    try:
        found = json.loads(os.read(rules, 2**16) or "[]")
    finally:
        os.close(rules)
    for rule in found:
        if path.endswith(rule["suffix"]) and rule.get("pid", os.getpid()) == os.getpid():
            if "until" in rule:
                while not Path(rule["until"]).exists():
                    time.sleep(0.01)
            elif rule["error"] == "MemoryError":
                raise MemoryError
            else:
                number = getattr(errno, rule["error"])
                raise OSError(number, os.strerror(number), path)
            break


def _faulty_open(path: Any, *arguments: Any, **named: Any) -> int:
    _apply_rules(str(path))
    return _open(path, *arguments, **named)


def _faulty_fork() -> int:
    _apply_rules("fork")
    return _fork()


def _faulty_fork_exec(*arguments: Any) -> Any:
    _apply_rules("exec")
    return _fork_exec(*arguments)


if _RULES:
    os.open = _faulty_open
    os.fork = _faulty_fork
    _posixsubprocess.fork_exec = _faulty_fork_exec
