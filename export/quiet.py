"""Silence around torch's converters and around a network that runs.

What they print (warnings, log records, graphs that a converter gives up, lines that C++ code writes
to the file descriptors) is captured. It is dropped on success, because the user can do nothing
about it, and a network runs hundreds of times for a proof. If an export is refused meanwhile, the
end of it is added to the error. A factory is outside: what it prints is shown once, as written.

File descriptors belong to the process, so that what other threads print during a capture is
captured too; the console of report.py writes to a descriptor of its own and goes on.
"""

import logging
import os
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import TextIO

from export.errors import ExportError

_MAX_LINES = 20  # of what is added to an error
_MAX_BYTES = 2**14  # of the end of a capture that are read
_LIBRARIES = ("torch", "onnx_ir", "onnxscript")
_OF_NO_USE = "torch.onnx._internal.exporter._registration"  # that torchvision is not installed

_capturing = False


def own_stderr() -> TextIO:
    """Open stderr once more, to write to it while it is captured; itself if it is no descriptor."""
    stderr = sys.stderr
    try:
        descriptor = os.dup(stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return stderr
    raw = FileIO(descriptor, "w", closefd=False)
    stream = TextIOWrapper(BufferedWriter(raw), stderr.encoding, stderr.errors, line_buffering=True)
    weakref.finalize(stream, os.close, descriptor)
    return stream


@contextmanager
def captured() -> Iterator[None]:
    """Capture what is printed inside; also usable as a decorator. Inner captures do nothing.

    Raises:
        ExportError: As raised inside, with the last lines that were printed.
    """
    global _capturing
    if _capturing:
        yield
        return
    _capturing = True
    try:
        with tempfile.TemporaryFile() as file:
            try:
                with _redirected(file.fileno()):
                    yield
            except ExportError as error:
                if printed := _last_lines(file.fileno()):
                    error.args = (f"{error}\nprinted before that:\n{printed}",)
                raise
    finally:
        _capturing = False


@contextmanager
def _redirected(descriptor: int) -> Iterator[None]:
    """Send stdout, stderr, warnings and the libraries' log records to a file."""
    with ExitStack() as undo:
        stream = undo.enter_context(
            os.fdopen(os.dup(descriptor), "w", 1, encoding="utf-8", errors="backslashreplace")
        )
        _flush()  # what was printed before is no part of it
        for number in (1, 2):
            with suppress(OSError):  # it is closed
                undo.callback(_restore, number, os.dup(number))
                os.dup2(descriptor, number)
        undo.enter_context(redirect_stdout(stream))
        undo.enter_context(redirect_stderr(stream))
        undo.enter_context(warnings.catch_warnings())
        # A warning is text here, also where Python is to raise it.
        warnings.simplefilter("default")
        for category in (DeprecationWarning, FutureWarning):  # of libraries, for their developers
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda message, category, filename, lineno, *_, **__: print(
            f"{category.__name__}: {message}", file=stream
        )
        useless = logging.getLogger(_OF_NO_USE)
        undo.callback(useless.setLevel, useless.level)
        useless.setLevel(logging.CRITICAL)
        for handler in _handlers():
            undo.callback(handler.setStream, handler.stream)
            handler.setStream(stream)
        yield


def _restore(number: int, kept: int) -> None:
    _flush()
    os.dup2(kept, number)
    os.close(kept)


def _flush() -> None:
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()


def _handlers() -> list["logging.StreamHandler[TextIO]"]:
    """List the handlers that write what torch and ONNX's libraries log."""
    names = (name for name in logging.root.manager.loggerDict if name.startswith(_LIBRARIES))
    loggers = [logging.getLogger(name) for name in names]
    return [
        handler
        for logger in loggers
        for handler in logger.handlers
        if type(handler) is logging.StreamHandler
    ]


def _last_lines(descriptor: int) -> str:
    """Read the last lines of a file, indented."""
    size = os.fstat(descriptor).st_size
    start = max(0, size - _MAX_BYTES)
    text = os.pread(descriptor, _MAX_BYTES, start).decode(errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    kept = lines[-_MAX_LINES:]
    if start or len(kept) < len(lines):
        kept.insert(0, "...")
    return "\n".join(f"  {line}" for line in kept)
