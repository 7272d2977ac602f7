"""What a person reads while an export runs: stages with their times, and the parity table.

Everything goes to stderr; stdout is for the result alone.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from export.parity import Measurement


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
        self._console.print(Text(f"warning: {line}", style="bold yellow"))

    def fail(self, line: str) -> None:
        """Tell why there is no result."""
        self._console.print(Text(f"error: {line}", style="bold red"))

    def parity(self, measurements: Sequence[Measurement]) -> None:
        """Show how far each runtime is from the float64 recursion."""
        table = Table(
            title="Distance from the float64 recursion", title_justify="left", box=box.SIMPLE_HEAD
        )
        table.add_column("runtime", no_wrap=True)
        for header in ("rows", "max abs", "max rel", "max ULP", "from eager", "of allowed"):
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
                Text("equal", style="green") if m.passed else Text("DIFFERS", style="bold red"),
            )
        self._console.print(table)
        self._console.print(
            Text(
                "  max rel is |y - y64| / max(1, |y64|); ULPs are float32's, at y64\n"
                "  allowed is 1e-5 of an output's size, or twice eager's error if that is more",
                style="dim",
            )
        )
