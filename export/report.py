"""What a person reads while an export runs: its stages with their times, facts, warnings, tables.

All of it goes to stderr; stdout is for the result alone. What moves (a spinner, a bar, a clock) is
shown on a terminal that can show it, and gone when its stage ends; a log has finished lines only.
Colours are left out where `NO_COLOR` is set, and where stderr is no terminal.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from export import tables
from export.errors import Ended, WarningsError
from export.expected import ChosenActivation
from export.network import Network
from export.proof.parity import Measurement
from export.quiet import own_stderr
from export.wording import expected_sentence
from kan_bundle.escaping import EscapingHook, escape
from kan_bundle.manifest import LayerRecord, Manifest, Precision, PruningRecord
from kan_bundle.scores import ExpectedRecord, TargetsRecord

_WIDTH_OF_A_LOG = 120  # which has none of its own; do not fold the table
_NARROW = 60  # columns of a terminal that has no room for a bar

Advance = Callable[[int], None]
"""Is told how much more has been done, in the unit of the stage's total."""


class Report:
    """The story of one export.

    Args:
        console: Where to tell it; by default stderr, in colour on a terminal.
        quiet: Tell warnings and errors alone.

    Attributes:
        exit_code: What the process is to end with since a signal came; None if none did.
        warnings: What was warned of.
        activation: The base activation, where the checkpoint does not tell it.
        strict: Whether warnings are to be refused in the end, and so are no warnings of Python's.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        # FORCE_COLOR asks for colours in a log, and is no reason to move about in it.
        self._console = console or Console(
            file=own_stderr(), highlight=False, force_interactive=sys.stderr.isatty()
        )
        self._console.push_render_hook(EscapingHook())  # type: ignore[arg-type]
        if not self._console.is_terminal:
            self._console.width = _WIDTH_OF_A_LOG
        self._quiet = quiet
        self.exit_code: int | None = None
        self._in_python = False
        self._started = time.perf_counter()
        self.warnings: list[str] = []  # for report.html, and for --strict
        self.activation: ChosenActivation | None = None
        self.strict = False

    @classmethod
    def silent(cls) -> Self:
        """Make one that tells nothing, but passes warnings on as Python's own."""
        report = cls(Console(quiet=True))
        report._in_python = True
        return report

    def end(self, exit_code: int) -> NoReturn:
        """End the export, at the latest before the next stage.

        Raises:
            Ended: Here, and, because a library on the way out may catch everything, again when a
                stage is about to begin.
        """
        self.exit_code = exit_code
        raise Ended(exit_code)

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Advance]:
        """Show that a stage runs and, when it has succeeded, how long it took.

        Args:
            name: What is done.
            total: How much of it there is, in whatever unit; 0 if that is not known.

        Yields:
            What to call with how much more has been done.
        """
        if self.exit_code is not None:
            raise Ended(self.exit_code)
        started = time.perf_counter()
        if self._moves:
            with self._progress() as progress:
                task = progress.add_task(name, total=total or None)
                yield lambda done: progress.advance(task, done)
        else:
            yield lambda done: None
        self._line(Text(f"  {name:<36}{time.perf_counter() - started:7.2f} s"))

    def say(self, line: str) -> None:
        """Tell a fact."""
        self._line(Text(f"  {line}"))

    def warn(self, line: str) -> None:
        """Tell something the user should act on, in one line."""
        line = escape(line)
        self.warnings.append(line)
        if self._in_python and not self.strict:
            warnings.warn(line, stacklevel=3)
        self._print(Text(f"warning: {line}", style="bold yellow"))

    def warn_if_assumed(self) -> None:
        """Warn of a base activation that is the default, which the user has not named."""
        if self.activation is not None and self.activation.assumed:
            self.warn(
                "the file does not say which base activation was trained; "
                f"{self.activation.name} is ASSUMED. If it was another, every answer is wrong: "
                "name it with --activation"
            )

    def refuse_warnings(self) -> None:
        """Turn the warnings, if there are any, into a refusal.

        Raises:
            WarningsError: With all of them.
        """
        if len(self.warnings) == 1:
            raise WarningsError(f"{self.warnings[0]} (--strict refuses what it would warn of)")
        if self.warnings:
            listed = "\n".join(f"  {i}. {line}" for i, line in enumerate(self.warnings, 1))
            raise WarningsError(
                f"--strict refuses what there are {len(self.warnings)} warnings of:\n{listed}"
            )

    def fail(self, line: str) -> None:
        """Tell why there is no result."""
        self._print(Text(f"error: {line}", style="bold red"))

    def found(self, network: Network, layers: Sequence[LayerRecord]) -> None:
        """Tell what is exported, and what its user should know."""
        for line in tables.found_lines(network, layers):
            self.say(line)
        for note in network.notes:
            self.warn(note)
        if not layers:
            self.warn("the network has no KANLinear layer; it is exported as it is written")
        if network.exact is not network.call:
            self.warn(
                "the weights are not all float32; the files are, and are compared with float64"
            )

    def parity(
        self,
        measurements: Sequence[Measurement],
        reference: str,
        precision: Precision,
        *,
        pruned: bool = False,
        far: bool = False,
    ) -> None:
        """Show how far each runtime is from the network in the precision of the reference.

        Args:
            measurements: One for each runtime.
            reference: Precision that they were compared in.
            precision: Of the files.
            pruned: Whether that network is a pruned one.
            far: Whether there are probes far outside of a grid.
        """
        network = "pruned network" if pruned else "network"
        rounded = "" if precision == "fp32" else f"{precision} "
        self._table(
            *tables.parity(
                measurements,
                f"the {rounded}{network} in {reference}",
                self._console.width,
                far=far,
            )
        )

    def as_expected(self, expected: ExpectedRecord) -> None:
        """Tell that answers are as expected, which confirms an assumed activation."""
        if self.activation is not None:
            self.activation = replace(self.activation, assumed=False)
        self.say(expected_sentence(expected))

    def scores(self, targets: Sequence[TargetsRecord]) -> None:
        """Show how good the checkpoint and the files are by targets."""
        for record in targets:
            self._table(*tables.scores(record))

    def pruned(self, pruning: PruningRecord) -> None:
        """Show what was left out and what it changes, and warn that it is another function."""
        for line in tables.pruning_lines(pruning):
            self.say(line)
        if pruning.zeroed > pruning.already:  # whether or not it shows at the rows compared
            self.warn(
                "pruned: this is NO LONGER the checkpoint's function. The files are proven equal "
                "to the pruned network; whether that is good enough is for your own test to say"
            )

    def result(self, manifest: Manifest, path: str, following: Sequence[tuple[str, str]]) -> None:
        """Show what was made, and what to do with it.

        Args:
            manifest: Of the bundle.
            path: Of its version folder.
            following: Commands with what each is for.
        """
        took_s = time.perf_counter() - self._started
        self._table(tables.result(manifest, path, took_s))
        if not self._quiet:  # to be copied, so no line is broken
            self._console.print(tables.following(following), soft_wrap=True)

    @property
    def _moves(self) -> bool:
        console = self._console
        still = self._quiet or console.quiet or console.is_dumb_terminal
        return console.is_terminal and console.is_interactive and not still

    def _progress(self) -> Progress:
        plain = not (self._console.encoding or "").lower().startswith("utf")
        bar = [BarColumn(bar_width=24)] if self._console.width >= _NARROW else []
        return Progress(
            SpinnerColumn("line" if plain else "dots"),
            TextColumn("{task.description}", markup=False),
            *bar,
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )

    def _line(self, text: Text) -> None:
        if not self._quiet:
            self._print(text)

    def _print(self, text: Text) -> None:
        # Between words on a terminal; a line of a log is one, however long.
        self._console.print(text, soft_wrap=not self._console.is_terminal)

    def _table(self, *parts: RenderableType) -> None:
        if not self._quiet:
            for part in parts:
                self._console.print(part)
