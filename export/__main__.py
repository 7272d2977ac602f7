"""`kan-export FILE`, or `python -m export FILE`: the command line of the exporter.

The path of the version folder, or with `--json` a summary, is all that goes to stdout. Exit codes:
0 done, 1 refused, 2 wrong usage, 128 and more ended by a signal.
"""

import argparse
import errno
import gc
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from export.arguments import OPSETS, parse
from export.errors import Ended, ExportError, SigningError
from kan_bundle.errors import BundleError
from kan_bundle.escaping import escape
from kan_bundle.manifest import Manifest

if TYPE_CHECKING:
    from export.report import Report
    from export.sparsity import Sparsity
    from kan_bundle.scores import TargetsRecord

_OF_THE_EXTRA = ("jinja2", "onnx", "onnx_ir", "onnxscript", "rich", "safetensors", "torch")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except Ended as ended:  # by another signal, while the first one's end is told
        return ended.exit_code
    except ModuleNotFoundError as error:  # the server and its clients do without
        if (error.name or "").partition(".")[0] not in _OF_THE_EXTRA:
            raise
        print(
            f"error: {error.name} is not installed; install kanserve's extra export: "
            "pip install '.[export]' in its checkout",
            file=sys.stderr,
        )
        return 1


def _run(words: list[str]) -> int:
    signals = [  # but not what a shell's background job ignores
        signum
        for signum in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(signum) is not signal.SIG_IGN
    ]
    for signum in signals:
        signal.signal(signum, _end_at_once)  # libraries are imported for seconds
    plotting = words[:1] == ["plot"]  # a file of that name is ./plot
    if plotting:
        from export import plot_command

        arguments = plot_command.parse(words[1:])
    else:
        arguments = parse(words)
    for stream in (sys.stdout, sys.stderr):  # names in a file may be anything
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with _uncollected():  # these import torch, as everything from here on
        from export.report import Report
        from kan_model import KanModelError

        if not plotting and not arguments.inspect:
            from export import api  # noqa: F401
    report = Report(quiet=not plotting and arguments.quiet)
    for signum in signals:
        signal.signal(signum, lambda signum, _: report.end(128 + signum))
    # For --model and --activation, also as kan-export. Last, or a folder that has an `export` of
    # its own would come before what is installed.
    sys.path.append(str(Path.cwd()))
    run: Callable[[argparse.Namespace, Report], tuple[int, str]] = (
        _plot if plotting else _inspect if arguments.inspect else _export
    )
    try:
        with _stdout_to_stderr():  # what a user's own network prints is no result
            code, result = run(arguments, report)
        return _print_result(result, report) or code
    except Ended:
        failure = ""
    except ExportError as error:
        failure = str(error)  # of several lines, where a library has printed some
    except (BundleError, KanModelError) as error:
        failure = escape(str(error))
    except OSError as error:
        where = error.filename or (arguments.file if plotting else arguments.output)
        flag = "-o" if plotting else "--output"
        remedy = "make room, or choose" if error.errno in _NO_ROOM else "choose"
        failure = f"{where}: {error.strerror or error}; {remedy} another {flag}"
    if report.exit_code is not None:  # whatever that became on its way here
        failure = "interrupted" if report.exit_code == 128 + signal.SIGINT else ""
    if failure:
        report.fail(failure)
    return report.exit_code or 1


def _end_at_once(signum: int, frame: FrameType | None) -> None:
    """End while there is nothing to be tidied up: an exception could come out of any import."""
    if signum == signal.SIGINT:
        with suppress(OSError):  # nobody reads it
            os.write(2, b"error: interrupted\n")
    os._exit(128 + signum)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import torch without the garbage collector, and keep it from what is imported.

    Half a million objects stay, and to look through them again and again takes a tenth of the time
    of a small export.
    """
    if "torch" in sys.modules or not gc.isenabled():  # another program's process
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what goes to stdout, also from programs and libraries that are called."""
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        kept = None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def _export(arguments: argparse.Namespace, report: "Report") -> tuple[int, str]:
    from export.api import export_checkpoint

    manifest = export_checkpoint(
        arguments.checkpoint,
        output=arguments.output,
        name=arguments.name,
        version=arguments.version,
        activation=arguments.activation,
        prefix=arguments.prefix,
        model=arguments.model,
        input_shape=arguments.input_shape,
        samples=arguments.samples,
        expected=arguments.expected,
        targets=arguments.targets,
        trust_pickle=arguments.trust_pickle,
        opset=arguments.opset or OPSETS[1],
        precision=arguments.precision or "fp32",
        prune=arguments.prune,
        inline=arguments.inline,
        benchmark=arguments.benchmark,
        torchscript=arguments.torchscript or "auto",
        sign_key=arguments.sign_key,
        sign_password=_read_password(arguments.sign_password_file),
        force=arguments.force,
        strict=arguments.strict,
        report=report,
    )
    path = arguments.output / manifest.name / str(manifest.version)
    report.result(manifest, str(path), _following(arguments, manifest))
    if arguments.json:
        return 0, json.dumps({"path": str(path), "manifest": asdict(manifest)})
    return 0, str(path)


def _read_password(path: Path | None) -> str | None:
    """Read a password: the first line of a file."""
    if path is None:
        return None
    try:
        return path.read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise SigningError(
            f"--sign-password-file: {path}: cannot be read: {getattr(error, 'strerror', error)}"
        ) from error


def _following(arguments: argparse.Namespace, manifest: Manifest) -> list[tuple[str, str]]:
    """Suggest commands that work as they are written here."""
    from export.inputs import shown
    from export.spelling import runnable

    folder = arguments.output / manifest.name / str(manifest.version)
    rows, ask, making = _rows_to_ask(arguments, manifest)
    if not rows:
        rows = _free_name("x", ".npy" if len(manifest.inputs) == 1 else ".npz")
        holds = [f"{spec.name} {spec.datatype} {shown(spec.shape)}" for spec in manifest.inputs]
        ask += f"; {rows} is yours to make: {'; '.join(holds)}"
    answers = _free_name("y", ".npy" if len(manifest.outputs) == 1 else ".npz")
    found = [
        (f"{runnable('kan-serve')} --model-repository {_quoted(arguments.output)}", "serve it")
    ]
    if making:
        found.append((making, f"bring the samples of all inputs together, in {rows}"))
    infer = f"{runnable('kan-client')} infer --model {shlex.quote(manifest.name)}"
    found.append((f"{infer} --input {_quoted(rows)} --output {answers}", ask))
    if "report.html" in manifest.files:
        found.append((_quoted(folder / "report.html"), "read how it does, in a browser"))
    return found


def _rows_to_ask(arguments: argparse.Namespace, manifest: Manifest) -> tuple[str, str, str]:
    """Choose the file to ask a server with.

    Returns:
        The file, if there is one; what asking is; and a command that makes the file first, if it
        must be made.
    """
    from export.inputs import split_name
    from export.spelling import python

    files = [split_name(text) for text in arguments.samples or ()]
    if not files:
        return "", "ask it", ""
    if len(files) == 1 and (len(manifest.inputs) == 1 or not files[0][0]):
        return files[0][1], "ask it", ""
    rows = _free_name("x", ".npz")
    parts = [f"{name!r}: numpy.load({path!r})" if name else f"**numpy.load({path!r})"
             for name, path in files]  # fmt: skip
    program = f"import numpy; numpy.savez({rows!r}, **{{{', '.join(parts)}}})"
    return rows, "ask it", f"{python()} -c {shlex.quote(program)}"


def _free_name(stem: str, suffix: str) -> str:
    """Name a file that is not there yet."""
    numbers = ("", *(f"-{i}" for i in range(2, 100)))
    return next(
        (name for n in numbers if not Path(name := f"{stem}{n}{suffix}").exists()), stem + suffix
    )


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))


def _inspect(arguments: argparse.Namespace, report: "Report") -> tuple[int, str]:
    """Tell what is in the file; the exit code says whether an export would take it."""
    from export import tables
    from kan_model import inspect_checkpoint, resolve_activation

    name = arguments.activation
    found = inspect_checkpoint(
        arguments.checkpoint,
        None if name is None else resolve_activation(name),
        prefix=arguments.prefix,
        trust_pickle=arguments.trust_pickle,
    )
    if arguments.model is not None:  # whether it fits is found out by building it
        found = replace(found, refused=None)
    sparsity: list[Sparsity] = []
    targets: tuple[TargetsRecord, ...] = ()
    if arguments.sparsity and found.refused is None:
        sparsity, targets = _measure_sparsity(arguments, report)
    code = 0 if found.refused is None else 1
    if arguments.json:
        content = asdict(found)
        if arguments.sparsity:
            content["sparsity"] = [asdict(step) for step in sparsity]
            content["targets"] = [asdict(record) for record in targets]
        return code, json.dumps(content, allow_nan=False)
    return code, tables.inspection(found, sparsity, targets)


def _measure_sparsity(
    arguments: argparse.Namespace, report: "Report"
) -> "tuple[list[Sparsity], tuple[TargetsRecord, ...]]":
    from export.answers import check_answers, read_answers
    from export.building import read_network
    from export.inputs import read_inputs
    from export.network import Network, describe_network
    from export.scoring import CHECKPOINT, score_network
    from export.sparsity import THRESHOLDS, prune_further
    from export.torch_state import standard_torch_state
    from kan_bundle.scores import TargetsRecord

    inputs = read_inputs(arguments.input_shape, arguments.samples)
    answers = read_answers(None, arguments.targets, inputs)
    with report.stage("read the network"):
        module = read_network(
            arguments.checkpoint,
            activation=arguments.activation,
            prefix=arguments.prefix,
            model=arguments.model,
            trust_pickle=arguments.trust_pickle,
            report=report,
        )
        with standard_torch_state():
            network = describe_network(module, inputs)
    report.warn_if_assumed()
    for note in network.notes:
        report.warn(note)
    if answers is not None:
        check_answers(answers, network.outputs)

    def score(pruned: Network, runtime: str = "pruned") -> tuple[TargetsRecord, ...]:
        return () if answers is None else score_network(pruned, answers, runtime)

    with standard_torch_state():
        targets = score(network, CHECKPOINT)
    with (
        standard_torch_state(),
        report.stage("leave out more and more edges", len(THRESHOLDS)) as advance,
    ):
        found = []
        for step in prune_further(network, THRESHOLDS, score):
            found.append(step)
            advance(1)
    return found, targets


def _plot(arguments: argparse.Namespace, report: "Report") -> tuple[int, str]:
    from export import plot_command

    return 0, str(plot_command.plot(arguments, report))


def _print_result(result: str, report: "Report") -> int:
    try:
        print(escape(result, keep="\n"), flush=True)
    except (OSError, ValueError) as error:  # a pipe that was closed, a full disk
        report.fail(f"the work is done, but stdout cannot be written: {error}")
        # The interpreter flushes stdout once more at its end, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
