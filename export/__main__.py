"""`python -m export FILE`: the command line of the exporter.

The path of the version folder, or with `--json` a summary, is all that goes to stdout. Exit codes:
0 done, 1 refused, 2 wrong usage, 128 and more ended by a signal.
"""

import argparse
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path

from export.errors import ExportError, InputError, SigningError
from export.onnx_graph import DEFAULT_OPSET, OLDEST_OPSET, check_opset
from export.pipeline import DEFAULT_ACTIVATION, export_checkpoint
from export.precision import PRECISIONS
from export.report import Report, render_inspection
from kan_bundle import __version__
from kan_bundle.errors import BundleError
from kan_bundle.layout import parse_version
from kan_model import KanModelError, inspect_checkpoint, resolve_activation
from kan_model.activations import NAMED

_EXPORT_ONLY = (
    *("--model", "--input-shape", "--samples"),
    *("--name", "--version", "--opset", "--precision", "--inline", "--force"),
    *("--sign-key", "--sign-password-file"),
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXAMPLES = """\
examples:
  python -m export model.pt                          models/model/1, SiLU assumed
  python -m export model.pt --activation gelu        the activation it was trained with
  python -m export runs/best.pt --name digits        models/digits, the next free version
  python -m export inspect model.pt                  what is in the file; nothing is exported
  python -m export model.pt --precision int8         a quarter of the size, nearly the same answers
  python -m export model.pt --sign-key key.pem       signed, for --require-signature
  python -m export last.ckpt --prefix ema.           one of several KANs in a file
  python -m export head.pt --model nets:build --input-shape 3,224,224
                                                     a network of your own with KAN layers inside
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["inspect"]:  # a file of that name is ./inspect
        words[0] = "--inspect"
    parser = _parser()
    arguments = parser.parse_args(words)
    if arguments.inspect and (strays := [flag for flag in _EXPORT_ONLY if _given(arguments, flag)]):
        parser.error(f"inspect exports nothing; leave out {', '.join(strays)}")
    if arguments.sign_password_file and not arguments.sign_key:
        parser.error("--sign-password-file is that of --sign-key; give both or neither")
    for stream in (sys.stdout, sys.stderr):  # names in a file may be anything
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    report = Report()
    signal.signal(signal.SIGTERM, lambda signum, _: report.end(128 + signum))
    sys.path.insert(0, str(Path.cwd()))  # for --model and --activation, also as kan-export
    run: Callable[[argparse.Namespace, Report], tuple[int, str]] = (
        _inspect if arguments.inspect else _export
    )
    try:
        with _stdout_to_stderr():  # what a user's own network prints is no result
            code, result = run(arguments, report)
    except (ExportError, BundleError, KanModelError) as error:
        report.fail(str(error))
        return 1
    except OSError as error:
        where = error.filename or arguments.output
        remedy = "; make room, or choose another --output" if error.errno in _NO_ROOM else ""
        report.fail(f"{where}: {error.strerror or error}{remedy}")
        return 1
    except KeyboardInterrupt:
        report.fail("interrupted")
        return 128 + signal.SIGINT
    return _print_result(result, report) or code


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


def _given(arguments: argparse.Namespace, flag: str) -> bool:
    return bool(getattr(arguments, flag.removeprefix("--").replace("-", "_")))


def _export(arguments: argparse.Namespace, report: Report) -> tuple[int, str]:
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
        trust_pickle=arguments.trust_pickle,
        opset=arguments.opset or DEFAULT_OPSET,
        precision=arguments.precision or "fp32",
        inline=arguments.inline,
        sign_key=arguments.sign_key,
        sign_password=_read_password(arguments.sign_password_file),
        force=arguments.force,
        report=report,
    )
    path = arguments.output / manifest.name / str(manifest.version)
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


def _inspect(arguments: argparse.Namespace, report: Report) -> tuple[int, str]:
    """Tell what is in the file; the exit code says whether an export would take it."""
    name = arguments.activation
    found = inspect_checkpoint(
        arguments.checkpoint,
        None if name is None else resolve_activation(name),
        prefix=arguments.prefix,
        trust_pickle=arguments.trust_pickle,
    )
    code = 0 if found.refused is None else 1
    if arguments.json:
        return code, json.dumps(asdict(found), allow_nan=False)
    return code, render_inspection(found)


def _print_result(result: str, report: Report) -> int:
    try:
        print(result, flush=True)
    except (OSError, ValueError) as error:  # a pipe that was closed, a full disk
        report.fail(f"the work is done, but stdout cannot be written: {error}")
        # The interpreter flushes stdout once more at its end, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        usage="python -m export [inspect] FILE [options]",
        description="Turn a trained efficient-KAN, or a network with KAN layers inside, into a "
        "verified ONNX and TorchScript bundle that python -m serving can serve.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="FILE",
        help="a state dict, a trainer's checkpoint or a whole module written by torch.save, or a "
        "safetensors file",
    )
    parser.add_argument(
        "--inspect",
        action="store_true",
        help="print what is in the file and export nothing; 'inspect FILE' does the same",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")

    bundle = parser.add_argument_group("the bundle")
    bundle.add_argument(
        "--output",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="the model repository (default: models)",
    )
    bundle.add_argument("--name", help="model name (default: the file's stem)")
    bundle.add_argument(
        "--version",
        type=_version,
        metavar="N",
        help="model version, a positive integer (default: the next free one)",
    )
    bundle.add_argument(
        "--opset",
        type=_opset,
        metavar="N",
        help=f"version of ONNX's operators, from {OLDEST_OPSET} on (default: {DEFAULT_OPSET})",
    )
    bundle.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the KAN layers' weights and products; below fp32 the model is smaller and only "
        "approximately what was trained (default: fp32)",
    )
    bundle.add_argument(
        "--inline",
        action="store_true",
        help="write KAN layers as standard operators alone, for runtimes that do not know "
        "model-local functions; such a file cannot run fused",
    )
    bundle.add_argument(
        "--sign-key",
        type=Path,
        metavar="KEY.pem",
        help="sign the version with this private key, in OpenSSF's model signing format, for "
        "python -m serving --require-signature",
    )
    bundle.add_argument(
        "--sign-password-file",
        type=Path,
        metavar="FILE",
        help="the password of that key is the first line of this file",
    )
    bundle.add_argument("--force", action="store_true", help="replace an existing version")

    file = parser.add_argument_group("what is in the file")
    file.add_argument(
        "--activation",
        metavar="NAME",
        help=f"base activation, if the file does not tell it: {', '.join(NAMED)}, or "
        f"package.module:Class (default: {DEFAULT_ACTIVATION}, with a warning)",
    )
    file.add_argument(
        "--prefix",
        metavar="PREFIX",
        help="take the weights behind this prefix, where the file holds several sets or more "
        "than a KAN; inspect shows them",
    )
    file.add_argument(
        "--trust-pickle",
        action="store_true",
        help="RUN the code in the file; only for files from people whose programs you would run",
    )

    network = parser.add_argument_group("a network of your own")
    network.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="a function without arguments that builds the network the weights belong to; it is "
        "imported and run",
    )
    network.add_argument(
        "--input-shape",
        action="append",
        metavar="[NAME=]SIZES",
        help="sizes of one row of an input, without the batch: 3,224,224 or image=3,224,224; once "
        "for each input, in the order of forward",
    )
    network.add_argument(
        "--samples",
        action="append",
        metavar="[NAME=]FILE",
        help="rows of real data, to compare on, to take shapes from, and to choose the scales of "
        "int8 on: .npy, or .npz with an array for each input",
    )
    parser.add_argument("--kanserve-version", action="version", version=f"kanserve {__version__}")
    return parser


def _version(text: str) -> int:
    number = parse_version(text)
    if number is None:
        raise argparse.ArgumentTypeError(
            f"expected a positive integer of at most 18 digits, found {text!r}"
        )
    return number


def _opset(text: str) -> int:
    try:
        return check_opset(int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--opset: ")) from None


if __name__ == "__main__":
    sys.exit(main())
