"""The flags of `kan-export`, in groups, with examples that are run by a test.

Nothing here imports torch, so that help and completion come at once.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from export.spelling import name_of
from kan_bundle import __version__
from kan_bundle.layout import parse_version
from kan_bundle.manifest import Precision

DEFAULT_ACTIVATION = "silu"
DEFAULT_OUTPUT = Path("models")
ACTIVATIONS = ("silu", "gelu", "relu", "tanh", "identity")
OPSETS = (17, 20)
"""The oldest and the default version of ONNX's operators."""

_EXAMPLES: Mapping[str, Sequence[tuple[str, str]]] = {
    "examples": (
        ("model.pt", "models/model/1, SiLU assumed"),
        ("model.pt --activation gelu", "as it was trained"),
        ("runs/best.pt --name digits", "models/digits, the next version"),
        ("last.ckpt --prefix ema.", "one of several KANs in a file"),
        ("head.pt --model nets:build --input-shape 3,8,8", "your own, with KAN layers in it"),
    ),
    "make sure that it is the right network": (
        ("model.pt --samples x.npy --expected y.npy", "answers that you know"),
        ("model.pt --samples x.npy --targets labels.npy", "accuracy of every file"),
        ("model.pt --activation silu --strict", "no warning, or no bundle"),
    ),
    "look closer": (
        ("inspect model.pt", "what is in the file"),
        ("inspect model.pt --sparsity", "which edges count, and cost"),
        ("plot model.pt -o kan.svg", "the learned curves"),
        ("model.pt --benchmark", "with times in report.html"),
    ),
    "smaller or faster, and no longer quite the same": (
        ("model.pt --precision int8 --samples x.npy", "a quarter of the size"),
        ("model.pt --prune 0.01 --samples x.npy", "without edges that count little"),
    ),
    "for programs and for others": (
        ("model.pt --json", "path and manifest, on stdout"),
        ("model.pt --quiet --force", "only warnings and errors"),
        ("model.pt --inline", "standard operators alone"),
        ("model.pt --sign-key key.pem", "signed, for --require-signature"),
    ),
}
_PURPOSE_COLUMN = 48  # of an example

_EXPORT_ONLY = (
    *("--name", "--version", "--opset", "--precision", "--prune", "--inline", "--benchmark"),
    *("--torchscript", "--expected"),
    *("--output", "--sign-key", "--sign-password-file", "--force", "--quiet", "--strict"),
)
_OTHER_PRECISIONS = {
    **{"float32": "fp32", "float": "fp32", "single": "fp32"},
    **{"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "i8": "int8", "qint8": "int8"},
}
_OF_NETWORKS = ("--model", "--input-shape", "--samples", "--targets")


def examples(command: str) -> str:
    """Write the examples of the help.

    Args:
        command: The exporter, as it is written here.
    """
    lines = []
    for title, group in _EXAMPLES.items():
        lines.append(f"{title}:")
        for words, purpose in group:
            line = f"  {command} {words}"
            if len(line) > _PURPOSE_COLUMN - 1:
                lines.append(line)
                line = ""
            lines.append(f"{line:<{_PURPOSE_COLUMN}} {purpose}")
    return "\n".join(lines) + "\n"


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command's arguments.

    Raises:
        SystemExit: They are wrong, or help was asked for.
    """
    if words[:1] == ["inspect"]:  # a file of that name is ./inspect
        words = ["--inspect", *words[1:]]
    if words == ["--version"]:  # elsewhere it is the model's
        words = ["--kanserve-version"]
    for i, word in enumerate(words[:-1]):  # argparse would take -1,3 for a flag
        if word == "--input-shape" and words[i + 1].startswith("-1"):
            words = [*words[:i], f"{word}={words[i + 1]}", *words[i + 2 :]]
            break
    parser = make_parser()
    arguments = parse_known(parser, words)

    def given(flags: tuple[str, ...]) -> str:
        """List those of some flags that are given."""
        values = {f: getattr(arguments, f.removeprefix("--").replace("-", "_")) for f in flags}
        return ", ".join(  # 0 is given, although it equals False
            flag for flag, value in values.items() if value is not None and value is not False
        )

    if arguments.inspect and (strays := given(_EXPORT_ONLY)):
        parser.error(f"inspect exports nothing; leave out {strays}")
    if arguments.inspect and not arguments.sparsity and (strays := given(_OF_NETWORKS)):
        parser.error(f"inspect exports nothing; leave out {strays}, or add --sparsity")
    if arguments.sparsity and not arguments.inspect:
        parser.error("--sparsity belongs to inspect; --prune leaves edges out of an export")
    if arguments.sign_password_file and not arguments.sign_key:
        parser.error("--sign-password-file is that of --sign-key; give both or neither")
    if not arguments.samples and (strays := given(("--expected", "--targets"))):
        parser.error(f"{strays}: is about the rows of --samples; give both")
    if arguments.output is None:
        arguments.output = DEFAULT_OUTPUT
    return arguments


def parse_known(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Read words; of a flag that there is not, say which one is written most like it.

    Raises:
        SystemExit: They are wrong, or help was asked for.
    """
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        found = get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        meant = f"; did you mean {found[0]}?" if found else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    return arguments


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog=name_of("kan-export"),
        usage="%(prog)s [inspect] FILE [options]\n"
        "       %(prog)s plot BUNDLE|CHECKPOINT -o FILE [options]",
        description="Turn a trained efficient-KAN, or a network with KAN layers inside, into a\n"
        f"verified ONNX and TorchScript bundle that {name_of('kan-serve')} can serve.",
        epilog=examples(name_of("kan-export")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="FILE",
        help="a state dict, a trainer's checkpoint or a whole module written by torch.save, or a "
        "safetensors file",
    )
    _add_inspect(parser)
    _add_bundle(parser)
    _add_form(parser)
    _add_file(parser)
    _add_network(parser)
    _add_output(parser)
    return parser


class _PrintCompletion(argparse.Action):
    """Prints a static script for a shell, so that no Python runs at a tab."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any, **_: Any) -> None:
        """Print it, and end the process."""
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion: shtab writes it: pip install shtab")
        for action in parser._actions:
            kind = str(action.metavar)
            if kind.endswith(("FILE", ".pem")):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif kind == "DIR":
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        parser.prog = "kan-export"
        with suppress(OSError):  # who reads may have enough
            print(shtab.complete(parser, given[1]), flush=True)
        parser.exit()


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("to look, and export nothing")
    group.add_argument(
        "--inspect",
        action="store_true",
        help="print what is in the file; 'inspect FILE' does the same",
    )
    group.add_argument(
        "--sparsity",
        action="store_true",
        help="with inspect: how many edges matter how little, and what leaving them out would "
        "change, on --samples or within the grid",
    )


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the bundle goes")
    group.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"the model repository (default: {DEFAULT_OUTPUT})",
    )
    group.add_argument("--name", help="model name (default: derived from the file's)")
    group.add_argument(
        "--version",
        type=_version,
        metavar="N",
        help="model version, a positive integer (default: the next free one)",
    )
    group.add_argument("--force", action="store_true", help="replace an existing version")
    group.add_argument(
        "--strict",
        action="store_true",
        help="refuse what there is any warning of, and write nothing; for CI",
    )
    group.add_argument(
        "--benchmark",
        action="store_true",
        help="time every runtime at several batch sizes, for report.html",
    )
    group.add_argument(
        "--sign-key",
        type=Path,
        metavar="KEY.pem",
        help="sign the version with this private key, in OpenSSF's model signing format, for "
        f"{name_of('kan-serve')} --require-signature",
    )
    group.add_argument(
        "--sign-password-file",
        type=Path,
        metavar="FILE",
        help="the password of that key is the first line of this file",
    )


def _add_form(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is written")
    group.add_argument(
        "--precision",
        type=_precision,
        choices=get_args(Precision),
        help="of the KAN layers' weights and products; below fp32 the model is smaller and only "
        "approximately what was trained (default: fp32)",
    )
    group.add_argument(
        "--prune",
        type=_threshold,
        metavar="SHARE",
        help="leave out the edges of KAN layers whose importance is at most this share of the "
        "largest in their layer, from 0 to below 1; what is written is then ANOTHER function than "
        "the checkpoint's, and is proven against that. 'inspect FILE --sparsity' shows what a "
        "share costs",
    )
    group.add_argument(
        "--opset",
        type=_opset,
        metavar="N",
        help=f"version of ONNX's operators, from {OPSETS[0]} on (default: {OPSETS[1]})",
    )
    group.add_argument(
        "--inline",
        action="store_true",
        help="write KAN layers as standard operators alone, for runtimes that do not know "
        "model-local functions; such a file cannot run fused",
    )
    group.add_argument(
        "--torchscript",
        choices=["auto", "on", "off"],
        help="on demands a TorchScript file, off leaves it out; auto leaves it out where only "
        "TorchScript fails, with a warning (default: auto)",
    )


def _add_file(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is in the file")
    group.add_argument(
        "--activation",
        metavar="NAME",
        help=f"base activation, if the file does not tell it: {', '.join(ACTIVATIONS)}, or "
        f"package.module:Class (default: {DEFAULT_ACTIVATION}, with a warning)",
    )
    group.add_argument(
        "--prefix",
        metavar="PREFIX",
        help="take the weights behind this prefix, where the file holds several sets or more "
        "than a KAN; inspect shows them",
    )
    group.add_argument(
        "--trust-pickle",
        action="store_true",
        help="RUN the code in the file; only for files from people whose programs you would run",
    )
    group.add_argument(
        "--samples",
        action="append",
        metavar="[NAME=]FILE",
        help="rows of real data, to compare on, to take shapes from, to choose the scales of "
        "int8 on, and to tell what matters: .npy, or .npz with an array for each input",
    )
    group.add_argument(
        "--expected",
        action="append",
        metavar="[NAME=]FILE",
        help="what the network is known to answer on all rows of --samples: .npy, or .npz with an "
        "array for each output; other answers are refused",
    )
    group.add_argument(
        "--targets",
        action="append",
        metavar="[NAME=]FILE",
        help="class labels (whole numbers) of the rows of --samples, or numbers of the output's "
        "shape: accuracy, or RMSE and MAE, of the checkpoint and of every file",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a network of your own")
    group.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="a function without arguments that builds the network the weights belong to; it is "
        "imported and run",
    )
    group.add_argument(
        "--input-shape",
        action="append",
        metavar="[NAME=]SIZES",
        help="sizes of one row of an input, without the batch: 3,224,224 or image=3,224,224 or "
        "tokens:INT64=128, or t:INT64= for one number a row; once for each input, in the order of "
        "forward",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is printed")
    group.add_argument("--json", action="store_true", help="the result as JSON, on stdout")
    group.add_argument(
        "--quiet", action="store_true", help="of the story on stderr only warnings and errors"
    )
    group.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=["bash", "zsh", "fish"],
        help="a script that completes kan-export, for that shell to read",
    )
    group.add_argument("--kanserve-version", action="version", version=f"kanserve {__version__}")


def _version(text: str) -> int:
    number = parse_version(text)
    if number is None:
        raise argparse.ArgumentTypeError(
            f"expected a positive integer of at most 18 digits, found {text!r}"
        )
    return number


def _precision(text: str) -> str:
    meant = _OTHER_PRECISIONS.get(text.lower(), text.lower())
    if meant != text and meant in get_args(Precision):
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(get_args(Precision))}, found {text!r}; did you mean {meant}?"
        )
    return text


def _threshold(text: str) -> float:
    with suppress(ValueError):
        share = float(text)
        if math.isfinite(share) and 0 <= share < 1:
            return share
    raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, found {text!r}")


def _opset(text: str) -> int:
    from export.conversion.onnx_graph import check_opset
    from export.errors import InputError

    try:
        return check_opset(int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--opset: ")) from None
