"""One model after the other: its files, every contender's answers, times and memory.

A contender that fails is left out with a line that says why; the others go on.
"""

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from benchmarks.contenders import (
    CONTENDERS,
    ORDER,
    Call,
    Contender,
    Knots,
    Model,
    answers,
    cycled,
)
from benchmarks.files import OUR_ONNX, WRITERS
from benchmarks.measuring import Entry, Memory, ModelResult, measure_memory, time_in_rounds
from benchmarks.roofline import limit_ms, measure_speed
from kan_model import KAN

ERROR_ROWS = 256
KNOTS: tuple[Knots, ...] = ("uniform", "adapted")


@dataclass(frozen=True)
class Settings:
    """What is compared: every width with every grid size and kind of knots, at every batch size."""

    widths: tuple[tuple[int, ...], ...] = (
        (16, 32, 8),
        (64, 64, 64, 10),
        (64, 256, 256, 10),
        (784, 64, 10),
        (1000, 1000, 1),
    )
    grids: tuple[int, ...] = (5, 20)
    knots: tuple[Knots, ...] = KNOTS
    batches: tuple[int, ...] = (1, 32, 256, 1024)
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    rounds: int = 10
    threads: int = 2

    @property
    def models(self) -> list[Model]:
        """All models, in the order in which they are measured."""
        return [Model(w, g, k) for w in self.widths for g in self.grids for k in self.knots]


class Story:
    """What a person sees while it runs, and why contenders were left out.

    Args:
        console: Where to tell it.
        steps: How many there will be.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self.skipped: list[str] = []
        self.progress = Progress(
            TextColumn(
                "{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            # Steps differ: a call takes microseconds, a compilation ten seconds.
            speed_estimate_period=1800,
        )
        self._task = self.progress.add_task("", total=steps)

    def now(self, what: str) -> None:
        """Say what is being done."""
        self.progress.update(self._task, description=what)

    def step(self, count: int = 1) -> None:
        """Count what has been done."""
        self.progress.advance(self._task, count)

    def say(self, line: str) -> None:
        """Tell a fact that stays on the screen."""
        self.progress.console.print(line, markup=False, highlight=False)

    def skip(self, line: str) -> None:
        """Tell why something was left out."""
        self.skipped.append(line)
        self.say(f"left out: {line}")


def build(model: Model) -> KAN:
    """Build a model, always the same one; its splines are as large as its base path.

    With efficient-KAN's small initial splines, errors in them would not show.
    """
    torch.manual_seed(0)
    kan = KAN(model.widths, model.grid_size, ORDER, scale_noise=model.grid_size).eval()
    if model.knots == "adapted":
        with torch.no_grad():
            kan(0.5 * torch.randn(1024, model.widths[0]), update_grid=True)
    return kan


def rows(model: Model) -> NDArray[np.float32]:
    """Draw inputs, shape (ERROR_ROWS, in): most inside the grid, every eighth row far outside."""
    x = 0.5 * np.random.default_rng(0).standard_normal((ERROR_ROWS, model.widths[0]))
    x[::8] *= 6
    return x.astype(np.float32)


def count_steps(settings: Settings) -> int:
    """Count a file, a load, a round and a measurement of memory as one step each."""
    contenders = len(settings.contenders)
    batches = len(settings.batches) * (contenders + settings.rounds)
    return len(settings.models) * (contenders + batches + contenders)


def measure(settings: Settings, story: Story, folder: Path) -> Iterator[ModelResult]:
    """Measure model after model.

    Args:
        settings: What.
        story: Is told of every step, `count_steps` of them.
        folder: For the models' files.

    Yields:
        What was found about each.
    """
    able = []
    for contender in (CONTENDERS[name] for name in settings.contenders):
        reason = contender.missing()
        if reason is None:
            able.append(contender)
        else:
            story.skip(f"{contender.name}: {reason}")
    absent = len(settings.contenders) - len(able)
    for number, model in enumerate(settings.models):
        place = folder / str(number)
        kan, x = build(model), rows(model)
        with torch.no_grad():
            y64 = copy.deepcopy(kan).double()(torch.from_numpy(x).double()).numpy()
        speed = measure_speed(model, settings.threads)
        ready = _write_files(kan, model, able, place, story)
        entries: list[Entry] = []
        for batch in settings.batches:
            entries += _measure_batch(settings, x, y64, model, batch, ready, place, story)
            story.step(len(settings.contenders) - len(ready))
        memory = _measure_memory(settings, x, model, ready, place, story)
        story.step(2 * absent + len(able) - len(ready))
        ours = place / OUR_ONNX
        yield ModelResult(
            model=model,
            entries=tuple(entries),
            memory=memory,
            onnx_bytes=ours.stat().st_size if ours.exists() else None,
            weight_bytes=model.weight_bytes,
            limits_ms={batch: limit_ms(model, batch, speed) for batch in settings.batches},
        )
        story.say(f"measured: {model}")


def _write_files(
    kan: KAN, model: Model, contenders: Sequence[Contender], folder: Path, story: Story
) -> list[Contender]:
    """Write what contenders load; returns those that have their file."""
    folder.mkdir()
    ready = []
    for contender in contenders:
        story.now(f"{model}: files for {contender.name}")
        path = folder / contender.file
        with _left_out_if_it_fails(f"{contender.name}, {model}", story):
            if not path.exists():  # one may be written with another
                WRITERS[contender.file](kan, path)
            ready.append(contender)
        story.step()
    return ready


def _measure_batch(
    settings: Settings,
    x: NDArray[np.float32],
    y64: NDArray[np.float64],
    model: Model,
    batch: int,
    contenders: Sequence[Contender],
    folder: Path,
    story: Story,
) -> list[Entry]:
    """Load all contenders, check their answers, and time them against each other."""
    calls: dict[str, Call] = {}
    errors: dict[str, float | None] = {}
    for contender in contenders:
        story.now(f"{model}, batch {batch}: {contender.name}")
        with _left_out_if_it_fails(f"{contender.name}, {model}, batch {batch}", story):
            bind = contender.load(folder / contender.file, settings.threads)
            found = answers(bind, x, batch) if contender.answers else None
            errors[contender.name] = None if found is None else float(np.abs(found - y64).max())
            call = bind(cycled(x, batch))
            call()  # what fails, fails here, and not among the rounds
            calls[contender.name] = call
        story.step()
    story.now(f"{model}, batch {batch}: rounds")
    timings = time_in_rounds(calls, settings.rounds, story.step)
    return [Entry(name, batch, timing, errors[name]) for name, timing in timings.items()]


def _measure_memory(
    settings: Settings,
    x: NDArray[np.float32],
    model: Model,
    contenders: Sequence[Contender],
    folder: Path,
    story: Story,
) -> dict[str, Memory]:
    """Measure what each contender holds at the largest batch; by name."""
    inputs = folder / "inputs.npy"
    np.save(inputs, cycled(x, max(settings.batches)))
    memory = {}
    for contender in contenders:
        story.now(f"{model}: memory of {contender.name}")
        with _left_out_if_it_fails(f"memory of {contender.name}, {model}", story):
            path = folder / contender.file
            memory[contender.name] = measure_memory(contender, path, inputs, settings.threads)
        story.step()
    return memory


@contextmanager
def _left_out_if_it_fails(what: str, story: Story) -> Iterator[None]:
    """Let one contender fail, in whatever way it does, without the others."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # exporters and compilers say much that nobody here can act on
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        story.skip(f"{what}: {type(error).__name__}: {first}")
    finally:
        logging.disable(disabled)


@contextmanager
def workspace() -> Iterator[Path]:
    """Give a folder for models and for what torch compiles; afterwards nothing is left."""
    with tempfile.TemporaryDirectory(prefix="kanserve-benchmark-") as folder:
        ours = {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no helper processes that live on beside timings
        }
        before = {key: os.environ.get(key) for key in ours}
        os.environ.update(ours)
        try:
            yield Path(folder)
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
