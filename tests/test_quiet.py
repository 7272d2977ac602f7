"""What is printed while a network is run or converted."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from export.errors import ConversionError, NetworkError
from export.quiet import captured
from tests.conftest import ROOT

PRINTING = """
import logging, os, sys, warnings
import torch
def speak():
    print("by print")
    print("by stderr", file=sys.stderr)
    os.write(2, b"by descriptor 2\\n")
    os.write(1, b"by descriptor 1\\n")
    warnings.warn("by warnings")
    logging.getLogger("torch.fx.experimental.symbolic_shapes").error("by logging")
"""


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", PRINTING + script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_nothing_that_is_printed_inside_gets_out_and_all_else_does() -> None:
    script = """
from export.quiet import captured, own_stderr
console = own_stderr()
print("before")
with captured():
    speak()
    with captured():
        speak()
    print("console", file=console)
print("after")
"""
    done = run(script, "-W", "error")
    assert done.stdout == "before\nafter\n"
    assert done.stderr == "console\n"


def test_a_refusal_shows_the_end_of_what_was_printed() -> None:
    script = """
from export.quiet import captured
from export.errors import ConversionError
try:
    with captured():
        for i in range(100): print("line", i)
        speak()
        raise ConversionError("cannot be written")
except ConversionError as error:
    print(error)
"""
    lines = run(script).stdout.splitlines()
    assert lines[:3] == ["cannot be written", "printed before that:", "  ..."]
    assert len(lines) <= 23
    for way in ("print", "stderr", "descriptor 1", "descriptor 2", "warnings", "logging"):
        assert any(f"by {way}" in line for line in lines), way


def test_a_refusal_after_silence_is_as_it_was() -> None:
    with pytest.raises(ConversionError) as found, captured():
        raise ConversionError("cannot be written")
    assert str(found.value) == "cannot be written"


def test_what_libraries_tell_their_developers_is_never_shown() -> None:
    @captured()
    def refuse() -> None:
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        warnings.warn("soon old", FutureWarning, stacklevel=1)
        raise NetworkError("refused")

    with pytest.raises(NetworkError) as found:
        refuse()
    assert str(found.value) == "refused"


def test_filters_handlers_and_descriptors_are_restored() -> None:
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("torch.kanserve_test")
    logger.addHandler(handler)

    def look() -> tuple[object, ...]:
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        return list(warnings.filters), handler.stream, sys.stdout, sys.stderr, descriptors

    before = look()
    try:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError), captured():
                raise ZeroDivisionError
        assert look() == before
    finally:
        logger.removeHandler(handler)


def test_closed_descriptors_are_no_obstacle() -> None:
    script = """
from export.quiet import captured
os.close(2)
with captured():
    os.write(1, b"inside\\n")
print("after")
"""
    assert run(script).stdout == "after\n"
