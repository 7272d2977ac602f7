"""What a person reads: the stages of an export with their times, the parity table, an inspection.

The story of an export goes to stderr; stdout is for the result alone.
"""

import io
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, Self

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from export.parity import Measurement
from export.precision import TOLERANCE
from kan_bundle.manifest import Precision
from kan_model.inspection import Inspection, LayerFacts
from kan_model.stacks import listed, printable

_MOST_LISTED = 12


class Report:
    """The story of one export.

    Args:
        console: Where to tell it; by default stderr, in colour on a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        if not self._console.is_terminal:  # a log has no width of its own; do not fold the table
            self._console.width = 120
        self._exit_code: int | None = None
        self._in_python = False
        self.warnings: list[str] = []  # for report.html

    @classmethod
    def silent(cls) -> Self:
        """Make one that tells nothing, but passes warnings on as Python's own."""
        report = cls(Console(quiet=True))
        report._in_python = True
        return report

    def end(self, exit_code: int) -> NoReturn:
        """End the process, at the latest before the next stage.

        Raises:
            SystemExit: Here, and, because a library on the way out may catch everything, again
                when a stage is about to begin.
        """
        self._exit_code = exit_code
        sys.exit(exit_code)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show that a stage runs and, when it has succeeded, how long it took."""
        if self._exit_code is not None:
            sys.exit(self._exit_code)
        started = time.perf_counter()
        with self._console.status(name):
            yield
        self._console.print(Text(f"  {name:<36}{time.perf_counter() - started:7.2f} s"))

    def say(self, line: str) -> None:
        """Tell a fact."""
        self._console.print(Text(f"  {line}"))

    def warn(self, line: str) -> None:
        """Tell something the user should act on."""
        self.warnings.append(line)
        if self._in_python:
            warnings.warn(line, stacklevel=3)
        self._console.print(Text(f"warning: {line}", style="bold yellow"))

    def fail(self, line: str) -> None:
        """Tell why there is no result."""
        self._console.print(Text(f"error: {line}", style="bold red"))

    def parity(
        self, measurements: Sequence[Measurement], reference: str, precision: Precision
    ) -> None:
        """Show how far each runtime is from the network in the precision of the reference."""
        exact = precision == "fp32"
        table = Table(
            title=f"Distance from the network in {reference}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("runtime", no_wrap=True)
        headers = ("rows", "max abs", "max rel", "max ULP", "from eager", "of allowed")
        for header in headers if exact else (*headers, "same argmax"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for m in measurements:
            table.add_row(
                m.runtime,
                str(m.rows),
                f"{m.max_absolute:.2e}",
                f"{m.max_relative:.2e}",
                f"{m.max_ulp:.3g}",
                f"{m.max_from_eager:.2e}",
                f"{m.excess:.0%}" if math.isfinite(m.excess) else "NaN",
                *([] if exact else ["" if m.same_argmax is None else f"{m.same_argmax:.2%}"]),
                Text("equal" if exact else "close", style="green")
                if m.passed
                else Text("DIFFERS", style="bold red"),
            )
        self._console.print(table)
        self._console.print(
            Text(
                "  max rel is |y - y64| / max(1, |y64|); ULPs are float32's, at y64\n"
                f"  allowed is {_share(precision)} of an output's size, or twice eager's error if "
                "that is more",
                style="dim",
            )
        )


def _share(precision: Precision) -> str:
    return f"{TOLERANCE[precision]:g}".replace("e-0", "e-")


def render_inspection(found: Inspection) -> str:
    """Show what a file holds, as text for stdout."""
    console = Console(file=io.StringIO(), highlight=False, soft_wrap=True, width=200)
    console.print(
        f"{printable(found.file)}: {found.format}, {found.size_bytes:,} bytes", markup=False
    )
    for kan in found.kans:
        at = f"prefix {kan.prefix!r}" if kan.prefix else "no prefix"
        console.print(f"\n{kan.kind} with {at}: {kan.parameters:,} parameters", markup=False)
        if kan.layers:
            console.print(_layer_table(kan.layers))
        kinds = (("WRONG", kan.faults), ("not in the file", kan.unknown), ("note", kan.doubts))
        for label, lines in kinds:
            for line in lines:
                console.print(f"  {label}: {line}", markup=False)
    if found.other_tensors:
        names = listed(found.other_tensors, _MOST_LISTED)
        console.print(f"\n{len(found.other_tensors)} other tensors: {names}", markup=False)
    verdict = "takes it" if found.refused is None else f"REFUSES it: {found.refused}"
    console.print(f"\nexport {verdict}", markup=False)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]


def _layer_table(layers: Sequence[LayerFacts]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    for header in ("in", "out", "grid", "order"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("knots", "range", "scaler", "activation", "type"):
        table.add_column(header, no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for layer in layers:
        ends = layer.grid_range
        table.add_row(
            Text(printable(layer.name)),
            str(layer.in_features),
            str(layer.out_features),
            str(layer.grid_size),
            str(layer.spline_order),
            layer.grid,
            f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else "not finite",
            "yes" if layer.standalone_scaler else "no",
            Text(printable(layer.base_activation or "not in the file")),
            layer.dtype,
            f"{layer.parameters:,}",
        )
    return table
