"""`kan-export plot BUNDLE|CHECKPOINT -o FILE`: curves of a model as svg, png or pdf."""

import argparse
import io
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from export.arguments import parse_known
from export.errors import InputError
from export.plots import Curves, Edges, plot_edge, plot_layer, plot_network, read_curves
from export.report import Report
from export.spelling import name_of, spell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")

_MOST = Edges.most  # of a layer

_EXAMPLES = """\
examples:
  kan-export plot models/m/1 -o kan.svg             the whole network
  kan-export plot models/m/1 --layer 0 -o l.pdf     its strongest edges
  kan-export plot m.pt --layer 1 --output 3 -o o.png
                                                    those of one output
  kan-export plot m.pt --layer 0 --input 3 --output 5 -o e.svg
                                                    one edge
"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the words behind `plot`; ends the process if they make no sense."""
    parser = argparse.ArgumentParser(
        prog=f"{name_of('kan-export')} plot",
        description="Draw the learned curves of a bundle or of a KAN's checkpoint; needs "
        "kanserve's extra plot.",
        epilog=spell(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="BUNDLE|CHECKPOINT",
        help="a version folder, its report.html, or a checkpoint of a KAN",
    )
    parser.add_argument(
        "-o",
        "--to",
        dest="file",
        type=_picture,
        required=True,
        metavar="FILE",
        help=f"what to write: a name that ends in {', '.join(FORMATS)}",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="one layer, by its number from 0 on (default: the diagram of the whole network)",
    )
    parser.add_argument("--input", type=int, metavar="I", help="edges from this input, from 0 on")
    parser.add_argument("--output", type=int, metavar="O", help="edges to this output, from 0 on")
    parser.add_argument(
        "--most", type=int, metavar="N", help=f"edges of a layer (default: {_MOST})"
    )
    parser.add_argument("--activation", metavar="NAME", help="of a checkpoint, as in an export")
    parser.add_argument("--prefix", metavar="PREFIX", help="of a checkpoint, as in an export")
    arguments = parse_known(parser, words)
    if arguments.layer is None and (arguments.input is not None or arguments.output is not None):
        parser.error("--input and --output are those of a layer; give its --layer, too")
    if arguments.most is not None:
        if arguments.layer is None:
            parser.error("--most is that of a layer; give its --layer, too")
        if arguments.input is not None and arguments.output is not None:
            parser.error("--input and --output are one edge; leave --most out")
        if arguments.most < 1:
            parser.error(f"--most: expected at least 1, found {arguments.most}")
    return arguments


def plot(arguments: argparse.Namespace, report: Report | None = None) -> Path:
    """Draw what was asked for, and write it.

    Args:
        arguments: From `parse`.
        report: As in `read_curves`.

    Returns:
        The file.

    Raises:
        ExportError: There is no such curve, or no matplotlib.
        KanModelError: The checkpoint cannot be used.
        OSError: The file cannot be written.
    """
    wanted = Edges(arguments.layer, arguments.input, arguments.output, arguments.most or _MOST)
    curves = read_curves(
        arguments.model,
        activation=arguments.activation,
        prefix=arguments.prefix,
        only=wanted,
        report=report,
    )
    figure = _draw(curves, wanted, arguments.model)
    import matplotlib

    # The same curves give the same file: no date, and names that do not come by chance.
    with matplotlib.rc_context({"svg.hashsalt": "kanserve", "svg.fonttype": "none"}):
        dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        ending = arguments.file.suffix.lower()
        content = io.BytesIO()
        figure.savefig(content, format=ending[1:], dpi=200, metadata=dated.get(ending, {}))
    path: Path = arguments.file
    _write(path, content.getvalue())
    return path


def _write(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all: what was there stays until all of the new is.

    Raises:
        OSError: It cannot be written; names the file.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with part.open("xb") as file:
            file.write(content)
        part.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _draw(curves: Curves, wanted: Edges, model: Path) -> "Figure":
    layers = curves.layers
    if not layers:
        raise InputError(f"{model}: the network has no KANLinear layer")
    if wanted.layer is None:
        if not curves.chain and len(layers) > 1:
            names = ", ".join(f"{i} is {layer.name}" for i, layer in enumerate(layers))
            raise InputError(
                f"{model}: its KANLinear layers lie within a larger network; choose one with "
                f"--layer: {names}"
            )
        return plot_network(layers)
    (layer,) = layers
    if wanted.feature is not None and wanted.output is not None:
        return plot_edge(layer, wanted.feature, wanted.output)
    return plot_layer(layer, feature=wanted.feature, output=wanted.output, most=wanted.most)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(
            f"expected a name that ends in {', '.join(FORMATS)}, found {text!r}"
        )
    return path
