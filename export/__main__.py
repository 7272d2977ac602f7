"""`python -m export FILE`: the command line of the exporter.

The path of the version folder, or with `--json` a summary, is all that goes to stdout. Exit codes:
0 done, 1 refused, 2 wrong usage, 128 and more ended by a signal.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from export.errors import ExportError
from export.pipeline import DEFAULT_ACTIVATION, ExportOptions, export_checkpoint
from export.report import Report
from kan_bundle import __version__
from kan_bundle.errors import BundleError
from kan_bundle.layout import parse_version
from kan_model import KanModelError
from kan_model.activations import NAMED

_EXAMPLES = """\
examples:
  python -m export model.pt                          models/model/1, SiLU assumed
  python -m export model.pt --activation gelu        the activation it was trained with
  python -m export runs/best.pt --name digits        models/digits, the next free version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    options = ExportOptions(
        checkpoint=arguments.checkpoint,
        output=arguments.output,
        name=arguments.name,
        version=arguments.version,
        activation=arguments.activation,
        force=arguments.force,
    )
    # onnxruntime would send usage data home and keep a database in the user's folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    report = Report()
    # An exception, so that what was staged is cleared away.
    signal.signal(signal.SIGTERM, lambda signum, _: report.end(128 + signum))
    try:
        exported = export_checkpoint(options, report)
    except (ExportError, BundleError, KanModelError) as error:
        report.fail(str(error))
        return 1
    except OSError as error:
        report.fail(f"{error.filename or options.output}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        report.fail("interrupted")
        return 128 + signal.SIGINT
    result = (
        json.dumps({"path": str(exported.path), "manifest": asdict(exported.manifest)})
        if arguments.json
        else str(exported.path)
    )
    return _print_result(result, report)


def _print_result(result: str, report: Report) -> int:
    try:
        print(result, flush=True)
    except (OSError, ValueError) as error:  # a pipe that was closed, a full disk
        report.fail(f"the bundle is published, but stdout cannot be written: {error}")
        # The interpreter flushes stdout once more at its end, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Turn a trained efficient-KAN checkpoint into a verified ONNX and TorchScript "
        "bundle that python -m serving can serve.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="FILE", help="saved by torch.save(model.state_dict(), ...)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="the model repository (default: models)",
    )
    parser.add_argument("--name", help="model name (default: the file's stem)")
    parser.add_argument(
        "--version",
        type=_version,
        metavar="N",
        help="model version, a positive integer (default: the next free one)",
    )
    parser.add_argument(
        "--activation",
        metavar="NAME",
        help=f"base activation: {', '.join(NAMED)}, or package.module:Class "
        f"(default: {DEFAULT_ACTIVATION}, with a warning)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing version")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.add_argument("--kanserve-version", action="version", version=f"kanserve {__version__}")
    return parser


def _version(text: str) -> int:
    number = parse_version(text)
    if number is None:
        raise argparse.ArgumentTypeError(
            f"expected a positive integer of at most 18 digits, found {text!r}"
        )
    return number


if __name__ == "__main__":
    sys.exit(main())
