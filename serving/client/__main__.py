"""`kan-client infer|models|health|bench`: the client from a shell.

The result alone goes to stdout, the story to stderr. Exit codes: 0 done, 1 refused or not answered,
2 wrong usage, 128 and more ended by a signal.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kan_bundle.escaping import escape
from serving.client import flags

_EXAMPLES = """\
examples:
  kan-client models --address 127.0.0.1:8001
  kan-client infer --model digits --input x.npy --output y.npy
  kan-client infer --model digits --input x.csv > y.csv
  kan-client infer --model digits --input x.npy --address a:8001,b:8001 --output y.npz
  kan-client health --address a:8001,b:8001 && echo ready
  kan-client bench --model digits --rate 100,200,400 --seconds 5 --plot digits.svg
  kan-client models --address kan.example:443 --ca ca.pem --token-file token
"""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read at import; what matters is told anyway
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    from serving.client.errors import ClientError, WrongSetting

    try:
        code = _command(arguments.command)(arguments) or 0
        sys.stdout.flush()
    except ClientError as error:
        _fail(str(error))
        return 2 if isinstance(error, WrongSetting) else 1
    except BrokenPipeError:
        # Whoever reads has enough; Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        _fail(_of_file(error))
        return 1
    except KeyboardInterrupt:
        _fail("interrupted")
        return 128 + signal.SIGINT
    return code


def _command(name: str) -> Callable[[argparse.Namespace], int | None]:
    """Import a command: most of them take numpy along, a probe does not."""
    if name == "health":
        from serving.client.health import health

        return health
    from serving.client import commands

    command: Callable[[argparse.Namespace], None] = getattr(commands, name)
    return command


def _of_file(error: OSError) -> str:
    """Say what is wrong with a file, and what to do."""
    path = Path(error.filename or "a file")
    if isinstance(error, FileNotFoundError) and not path.parent.exists():
        return f"{path}: there is no folder {path.parent}; check the path, or make the folder"
    words = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file; check the path"
    if isinstance(error, IsADirectoryError):
        return f"{path}: expected a file, found a folder; name a file in it"
    if isinstance(error, PermissionError):
        return f"{path}: {words}; choose another, or ask who owns it for the right to it"
    if error.errno in _NO_ROOM:
        return f"{path}: {words}; make room, or write it elsewhere"
    return f"{path}: {words}; check the path"


def _fail(line: str) -> None:
    print(f"error: {escape(line)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kan-client",
        description="Ask a server of the Open Inference Protocol.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=["bash", "zsh", "fish"],
        help="print a script that completes kan-client, for that shell to read",
    )
    parser.add_argument(
        *("--kanserve-version", "--version"), action=_PrintVersion, nargs=0,
        help="print the version; after a command, --version is the model's",
    )  # fmt: skip
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=flags.Parser
    )
    way = flags.way(30, "for each message")
    infer = commands.add_parser("infer", parents=[way], help="have the rows of a file answered")
    _add_model(infer)
    infer.add_argument(
        "--input", required=True, metavar="FILE", help=".npy, .npz or CSV; - for stdin"
    )
    infer.add_argument(
        "--output", default="-", type=_target, metavar="FILE",
        help=".npy, .npz or .csv; - for stdout, which is CSV, and the default",
    )  # fmt: skip
    infer.add_argument("--output-tensor", metavar="NAME", help="which output, of several")
    infer.add_argument(
        "--header", choices=["auto", "yes", "no"], default="auto",
        help="whether the first line of a CSV holds names; auto looks, and asks if it cannot tell",
    )  # fmt: skip
    models = commands.add_parser("models", parents=[way], help="list what there is")
    models.add_argument("--json", action="store_true", help="as JSON")
    health = commands.add_parser(
        "health",
        parents=[flags.way(2, "for the answers of all")],
        help="ask whether servers take requests; exit code 0 if every one says SERVING",
    )
    health.add_argument(
        "--service", default="", metavar="NAME",
        help="of which service; by default of the server, which is its readiness",
    )  # fmt: skip
    bench = commands.add_parser(
        "bench", parents=[way], help="send requests at random moments, so many a second"
    )
    _add_model(bench)
    bench.add_argument(
        "--rate",
        required=True,
        type=_rates,
        metavar="R[,R]",
        help="requests a second, one load each",
    )
    bench.add_argument("--seconds", type=flags.positive, default=5.0, help="of each load (5)")
    bench.add_argument("--rows", type=_count, default=1, help="in a request (1)")
    bench.add_argument(
        "--in-flight", type=_count, default=64, help="most requests under way at a time (64)"
    )
    bench.add_argument("--connections", type=_count, default=4, help="to spread them on (4)")
    bench.add_argument("--seed", type=int, default=0, help="of inputs and moments (0)")
    bench.add_argument("--json", metavar="FILE", help="write what was found")
    bench.add_argument("--plot", type=_svg, metavar="FILE.svg", help="draw it")
    return parser


class _PrintVersion(argparse.Action):
    """Prints the version, which is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        """Print it, and end the process."""
        from importlib import metadata

        try:
            version = metadata.version("kanserve")
        except metadata.PackageNotFoundError:  # a checkout that nobody has installed
            parser.error("--kanserve-version: kanserve is not installed; pip install it first")
        with suppress(OSError):  # who reads may have enough
            print(f"kanserve {version}", flush=True)
        parser.exit()


class _PrintCompletion(argparse.Action):
    """Prints a static script for a shell, so that no Python runs at a tab."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any, **_: Any) -> None:
        """Print it, and end the process."""
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion: shtab writes it: pip install shtab")
        commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for each in (parser, *(one for action in commands for one in action.choices.values())):
            for action in each._actions:
                if str(action.metavar).startswith("FILE"):
                    action.complete = shtab.FILE
        with suppress(OSError):  # who reads may have enough
            print(shtab.complete(parser, given[1]), flush=True)
        parser.exit()


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME")
    parser.add_argument("--version", default="", metavar="N", help="by default the newest")


def _target(text: str) -> str:
    from serving.client.files import output_form

    try:
        output_form(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _svg(text: str) -> str:
    if not text.lower().endswith(".svg"):
        raise argparse.ArgumentTypeError(f"expected a name that ends with .svg, found {text!r}")
    return text


def _count(text: str) -> int:
    with suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")


def _rates(text: str) -> tuple[float, ...]:
    return tuple(flags.positive(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
