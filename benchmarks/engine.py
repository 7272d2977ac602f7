"""`python -m benchmarks.engine`: what the export writes, measured beside other ways to run a KAN.

The table goes to stdout, as Markdown, and with engine.json and a plot to the output folder; the
story goes to stderr. Exit codes: 0 done, 1 a file cannot be written, 2 wrong usage, 128 and more
ended by a signal.
"""

import argparse
import importlib.util
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from benchmarks.comparison import KNOTS, Settings, Story, count_steps, measure, workspace
from benchmarks.contenders import CONTENDERS, find_contender
from benchmarks.drawing import draw, render
from benchmarks.measuring import ModelResult, Results
from kan_bundle import __version__

QUICK = Settings(
    widths=((16, 32, 8), (64, 64, 64, 10)),
    grids=(5,),
    knots=("adapted",),
    batches=(1, 256),
    rounds=5,
)
"""A run of a minute or two, to see that it runs."""


_FILES = ("engine.json", "engine.md", "engine.svg", "engine.png")


def describe_machine(threads: int) -> dict[str, str | int]:
    """Tell what figures depend on."""
    facts: dict[str, str | int] = {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load average before": f"{os.getloadavg()[0]:.2f}",  # of others: figures want it near 0
        "python": ".".join(map(str, sys.version_info[:3])),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
        "kanserve": __version__,
    }
    for name in ("torch", "onnxruntime", "openvino"):  # modules: distributions have other names
        facts[name] = "not installed"
        if importlib.util.find_spec(name) is not None:
            facts[name] = importlib.import_module(name).__version__.partition("-")[0]
    return facts


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return "unknown"


def as_json(results: Results) -> str:
    """Write results as JSON: dataclasses as they are, with what a reader would have to work out."""
    document = asdict(results)
    for model, result in zip(document["models"], results.models, strict=True):
        for plain, entry in zip(model["entries"], result.entries, strict=True):
            plain["wrong"] = entry.wrong
            if entry.error is not None and not math.isfinite(entry.error):
                plain["error"] = None  # JSON has no NaN
    return json.dumps(document, indent=1, allow_nan=False)


def run(settings: Settings, output: Path, console: Console) -> Results:
    """Measure, and write engine.json after every model, engine.md and the plot at the end.

    Args:
        settings: What to measure.
        output: A folder that exists.
        console: For the story.

    Returns:
        What was found.

    Raises:
        OSError: Something cannot be written.
        KeyboardInterrupt: What was measured until then is in engine.json.
    """
    story = Story(console, count_steps(settings))
    machine = describe_machine(settings.threads)
    models: list[ModelResult] = []
    for name in _FILES:  # of an earlier run
        (output / name).unlink(missing_ok=True)
    with story.progress, workspace() as folder:
        for result in measure(settings, story, folder):
            models.append(result)
            results = Results(machine, asdict(settings), tuple(models), tuple(story.skipped))
            aside = output / "engine.json.part"
            aside.write_text(as_json(results) + "\n")
            aside.replace(output / "engine.json")
    (output / "engine.md").write_text(render(results) + "\n")
    try:
        draw(results, output)
    except ImportError:
        story.say("no plot: matplotlib is not installed; make benchmark installs it")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    arguments = vars(_parser().parse_args(argv))
    output: Path = arguments.pop("output")
    preset = QUICK if arguments.pop("quick") else Settings()
    settings = replace(preset, **{key: value for key, value in arguments.items() if value})
    console = Console(stderr=True, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        output.mkdir(parents=True, exist_ok=True)
        print(render(run(settings, output, console)), flush=True)
    except OSError as error:
        console.print(f"error: {error.filename or output}: {error.strerror or error}", markup=False)
        return 1
    except KeyboardInterrupt:
        found = output / "engine.json"
        console.print(
            f"interrupted; what was measured until then is in {found}"
            if found.exists()
            else "interrupted before the first model was measured; there are no results",
            markup=False,
        )
        return 128 + signal.SIGINT
    written = [name for name in _FILES if (output / name).exists()]
    console.print(f"also in {output}: {', '.join(written)}", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description="Compare kanserve's files with other ways to run a KAN on this machine's CPU: "
        "time, error, memory. Everything takes 50 minutes on two cores, --quick a minute or two.",
        epilog=f"contenders: {', '.join(name.replace(' ', '-') for name in CONTENDERS)}",
    )
    parser.add_argument(
        "--models",
        dest="widths",
        nargs="+",
        type=_widths,
        action=_Distinct,
        metavar="WIDTHS",
        help="widths from input to output, as 64x64x10",
    )
    parser.add_argument("--grids", nargs="+", type=_positive, action=_Distinct, metavar="G")
    parser.add_argument("--knots", nargs="+", choices=KNOTS, action=_Distinct)
    parser.add_argument("--batches", nargs="+", type=_positive, action=_Distinct, metavar="ROWS")
    parser.add_argument(
        "--contenders", nargs="+", type=_contender, action=_Distinct, metavar="NAME"
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help="turns of each contender")
    parser.add_argument("--threads", type=_positive, metavar="N", help="for every runtime")
    parser.add_argument("--quick", action="store_true", help="two small models, few rounds")
    parser.add_argument(
        "--output", type=Path, default=Path("build/benchmark"), metavar="DIR", help="for files"
    )
    return parser


class _Distinct(argparse.Action):
    """Keeps each value once, in order."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(values, list)
        setattr(namespace, self.dest, tuple(dict.fromkeys(values)))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, found {text!r}")
    return int(text)


def _widths(text: str) -> tuple[int, ...]:
    widths = tuple(_positive(part) for part in text.split("x"))
    if len(widths) < 2:
        raise argparse.ArgumentTypeError(f"expected at least two widths, as 4x3, found {text!r}")
    return widths


def _contender(text: str) -> str:
    try:
        return find_contender(text)
    except KeyError:
        known = ", ".join(name.replace(" ", "-") for name in CONTENDERS)
        raise argparse.ArgumentTypeError(f"expected one of {known}, found {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
