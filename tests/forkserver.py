"""Runs of a command that start as forks of a warm process, in place of a new interpreter.

A new interpreter imports torch and what torch exports with for five seconds; an export takes one.
So each process of pytest starts a server on first use, which imports all that and exports one
network. `command` then makes a command line for `subprocess`: a small client sends its arguments,
environment, folder and descriptors 0 to 2 to the server, forwards signals, and ends as the fork
does. A fork has the state of a new interpreter as far as an export depends on it: warning filters,
paths, streams, signals, torch's random numbers. Tests of the start itself run a new interpreter:
imports, flags and variables of Python, what is not installed.
"""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_LARGEST = 2**17  # bytes of a request, which is environment above all; a socket takes more
_AT_START = ("PYTHONUTF8", "PYTHONCOERCECLOCALE", "PYTHONWARNINGS", "LC_ALL", "LC_CTYPE")
_exits: list[int] = []
"""How a fork has ended, if not by an exception."""
_GOLDEN = "tests/goldens/uniform_4x8x3.pt"


def command(*words: str) -> list[str]:
    """Make a command that ends as `python WORDS` does.

    Args:
        words: `-W error` or nothing; `-m MODULE`, `-c CODE` or a script; its arguments.
    """
    return [sys.executable, "-I", "-S", __file__, _address(), *words]


@functools.cache
def _address() -> str:
    """Start the server of this process, which ends with it, and name its socket."""
    folder = tempfile.mkdtemp(prefix="forkserver-")
    path = f"{folder}/socket"
    server = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.forkserver", "--serve", path],
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        env=os.environ | {"OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # streams on pipes may become anything in a fork
        start_new_session=True,  # an interrupt of the tests is not one of the server
    )

    def stop() -> None:
        server.communicate()  # it ends when its stdin does
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.rmdir(folder)

    atexit.register(stop)
    assert server.stdout is not None
    printed = []
    for line in server.stdout:
        if line == b"warm\n":
            return path
        printed.append(line.decode())
    raise AssertionError("no fork server:\n" + "".join(printed))


def _forward(address: str, words: Sequence[str]) -> int:
    """Have a command run by the server with what this process has.

    Returns:
        The exit code; of a signal that ended it, the negative number.
    """
    descriptors = []
    for number in (0, 1, 2):
        with suppress(OSError):  # it is closed
            os.fstat(number)
            descriptors.append(number)
    request = {"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        text = json.dumps(request | {"descriptors": descriptors}).encode()
        socket.send_fds(connection, [text], descriptors)
        process = int(connection.recv(16))
        for signum in _FORWARDED:
            signal.signal(signum, lambda signum, _: os.kill(process, signum))
        for number in descriptors:
            os.close(number)  # the end of a pipe is the end of the fork's
        return int(connection.recv(16))


class _Forked(Exception):
    """Leads a fork out of the server's loop, with a request and its descriptors."""


def _serve(listener: socket.socket) -> None:
    """Fork for each connection, until stdin ends.

    A client gets the number of the process, and at its end the exit code. If the client is killed,
    the fork is, too.

    Raises:
        _Forked: In a fork.
    """
    import selectors

    running: dict[int, tuple[socket.socket, int]] = {}  # a connection and a pidfd, by process
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    for process in running:
                        os.kill(process, signal.SIGKILL)
                        os.waitpid(process, 0)
                    return
                if key.fileobj is listener:
                    connection = listener.accept()[0]
                    text, descriptors, _, _ = socket.recv_fds(connection, _LARGEST, 3)
                    process = os.fork()
                    if process == 0:
                        for other, pidfd in (*running.values(), (connection, -1)):
                            other.close()
                            with suppress(OSError):
                                os.close(pidfd)
                        raise _Forked(json.loads(text), descriptors)
                    for number in descriptors:
                        os.close(number)
                    running[process] = connection, os.pidfd_open(process)
                    for readable in running[process]:
                        selector.register(readable, selectors.EVENT_READ, process)
                    connection.send(b"%d" % process)
                    continue
                if key.data not in running:  # both its ends were seen at once
                    continue
                connection, pidfd = running[key.data]
                if key.fileobj is connection:  # the client is gone
                    os.kill(key.data, signal.SIGKILL)
                    selector.unregister(connection)
                    continue
                code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                with suppress(OSError):  # the client is gone
                    connection.send(b"%d" % code)
                with suppress(KeyError):  # as above
                    selector.unregister(connection)
                selector.unregister(pidfd)
                os.close(pidfd)
                connection.close()
                del running[key.data]


def _warm_up() -> None:
    """Import what exports import, also while they run, and leave the state as it was."""
    import gc
    import runpy

    import torch

    from tests.registry import read_operators_once

    read_operators_once()
    state, path, streams = torch.get_rng_state(), list(sys.path), _streams()
    with tempfile.TemporaryDirectory() as folder:
        common = [_GOLDEN, "--activation", "silu"]
        for words in (["plot", *common, "-o", f"{folder}/kan.svg"], [*common, "--output", folder]):
            sys.argv = ["export", *words]
            with suppress(SystemExit):
                runpy.run_module("export", run_name="__main__", alter_sys=True)
    _empty_caches()
    torch.set_rng_state(state)
    sys.path[:] = path
    for stream, errors in streams:
        stream.reconfigure(errors=errors)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.collect()
    gc.freeze()  # or the first collection of a fork would copy every page
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a fork has the calling thread alone, and its parent has {threads}"


def _streams() -> list[tuple[Any, str | None]]:
    """List the standard streams with what they do about characters that they cannot write."""
    return [(stream, stream.errors) for stream in (sys.stdin, sys.stdout, sys.stderr)]


def _empty_caches() -> None:
    """Forget what the project's functions remember, as where commands are on PATH.

    But not the template of the report, which is the same everywhere and slow to compile.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("export.report_page."):
            continue
        if name.partition(".")[0] in ("export", "kan_bundle", "kan_model", "kan_ops"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _become(request: dict[str, Any], descriptors: Sequence[int]) -> list[str]:
    """Give a fork the state in which the interpreter of its client would have started.

    Returns:
        What to run: `-m MODULE`, `-c CODE` or a script, and its arguments.
    """
    import warnings

    environment: dict[str, str] = request["environment"]
    words: list[str] = request["words"]
    different = [key for key in _AT_START if environment.get(key) != os.environ.get(key)]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    for number in (0, 1, 2):
        os.close(number)
    for number, descriptor in zip(request["descriptors"], descriptors, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    encoding, _, errors = environment.get("PYTHONIOENCODING", "").partition(":")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number not in request["descriptors"]:
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
            continue
        stream: Any = getattr(sys, name)
        own = stream.errors if number == 2 or not errors else errors
        stream.reconfigure(encoding=encoding or None, errors=own)
        if number == 1:
            stream.reconfigure(line_buffering=os.isatty(1))
    if different:
        sys.exit(f"{', '.join(different)}: only a new interpreter follows it, start one")
    if words[:2] == ["-W", "error"]:
        words = words[2:]
    else:
        sys.warnoptions.clear()
        filters: Any = warnings.filters
        filters.remove(("error", None, Warning, None, 0))
        warnings.filterwarnings("default", "", DeprecationWarning, "__main__", append=True)
        for category in (
            DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning
        ):  # fmt: skip
            warnings.simplefilter("ignore", category, append=True)
    first = {"-m": os.getcwd(), "-c": ""}.get(words[0])
    if first is None:
        first = os.path.dirname(os.path.realpath(words[0]))
    given = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [first, *dict.fromkeys((*given, *sys.path[1:]))]
    return words


def _run(words: list[str]) -> None:
    """Run what an interpreter is given, as the main module.

    How it ends is the interpreter's own, but that an exit leaves out to free every object.
    """
    import importlib

    importlib.invalidate_caches()
    try:
        _run_main(words)
        _exits.append(0)
    except SystemExit as end:
        _exits.append(0 if end.code is None else end.code if isinstance(end.code, int) else 1)
        raise


def _exit() -> None:
    """Exit from a fork, after all else that is done at exit."""
    if _exits:
        with suppress(OSError):  # which the interpreter tells
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(_exits[0] & 0xFF)


def _run_main(words: list[str]) -> None:
    import runpy

    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        code = _forward(sys.argv[1], sys.argv[2:])
        if code < 0:
            with suppress(OSError):  # SIGKILL has no handler
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)
    atexit.register(_exit)  # before all others, so that it comes last
    fork: Any = None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(sys.argv[2])
        listener.listen()
        _warm_up()
        os.write(1, b"warm\n")
        try:
            _serve(listener)
        except _Forked as forked:
            fork = forked.args
    if fork is not None:
        _run(_become(*fork))
