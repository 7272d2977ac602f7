"""Hostile files, and whether each is refused as it must be: `python -m tests.hostile`.

Every file is given to the command that would open it, in a process of its own that is forked after
the imports: inspect, export and plot of a checkpoint; export with samples; plot of a report; the
loading of a bundle. It must be refused within a time and within memory above that of a run that
opens nothing, with exit code 1, one line that begins with `error:`, no control character, and
nothing written. A few kinds are harmless now and then: those files may pass. Prints a table.
"""

import argparse
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch

from export import plot_command
from export.__main__ import main as export_main
from export.api import export_checkpoint
from kan_bundle.errors import BundleError
from kan_bundle.layout import MANIFEST_FILE, BundleFolder
from kan_model import KAN
from serving.batching import Limits
from serving.models.loading import load_bundle
from tests.hostile.kinds import KINDS, Kind

LONGEST_S = 10.0
LARGEST_MB = 500.0
_KILLED_S = 120
_RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069]")
_IMPORTED = (plot_command, export_checkpoint)  # before a fork, not in each


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    Attributes:
        kind: Of the file.
        seconds: Of a processor that it took.
        megabytes: Of memory above a run that opens nothing.
        faults: What was wrong; empty if it was refused as it must be.
        passed: Whether it was let through.
        told: What was printed.
    """

    kind: str
    seconds: float
    megabytes: float
    faults: tuple[str, ...]
    passed: bool
    told: str


class Harness:
    """Gives hostile files to commands.

    Args:
        folder: For files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._honest = folder / "honest.pt"
        torch.manual_seed(0)
        torch.save(KAN([3, 4, 2]).state_dict(), self._honest)
        self._samples = folder / "samples.npy"
        np.save(self._samples, np.zeros((4, 3), np.float32))
        absent = folder / "absent.pt"
        self._empty_kb = self._fork(lambda: export_main(["inspect", str(absent)]), folder / "no")[2]

    def try_file(self, name: str, seed: int) -> Outcome:
        """Make a file and give it to its command."""
        kind = KINDS[name]
        random = Random(f"{name} {seed}")
        place = self._folder / f"{seed}-{list(KINDS).index(name)}"
        place.mkdir()
        try:
            file = place / f"hostile{kind.suffix or '.json'}"
            if kind.slow:  # in another process, so that this one stays small
                self._fork(lambda: file.write_bytes(kind.make(random)) and 0, place / "made")
            else:
                file.write_bytes(kind.make(random))
            return self._try(name, kind, file, seed)
        finally:
            shutil.rmtree(place)

    def _try(self, name: str, kind: Kind, file: Path, seed: int) -> Outcome:
        written = file.parent / "written"
        command, what = self._command(kind, file, written, seed)
        code, seconds, peak_kb, told = self._fork(command, file.parent / "told")
        megabytes = (peak_kb - self._empty_kb) / 1024
        passed = code == 0
        lines = [line for line in told.splitlines() if line.startswith("error:")]
        faults = {
            f"exit code {code}": not (code == 1 or (passed and kind.may_pass)),
            "slow": not passed and seconds > LONGEST_S,
            "large": not passed and megabytes > LARGEST_MB,
            "a traceback": "Traceback" in told,
            f"{len(lines)} lines of errors": code == 1 and what != "inspect" and len(lines) != 1,
            "a control character": _RAW.search(told) is not None,
            "something written": code == 1 and written.exists() and any(written.iterdir()),
        }
        found = tuple(fault for fault, there in faults.items() if there)
        return Outcome(name, seconds, megabytes, found, passed, told)

    def _command(
        self, kind: Kind, file: Path, written: Path, seed: int
    ) -> tuple[Callable[[], int], str]:
        output = ["--output", str(written), "--quiet"]
        match kind.use:
            case "checkpoint":
                what = ("inspect", "inspect", "export", "plot")[seed % 4]
                words = {
                    "inspect": ["inspect", str(file)],
                    "export": [str(file), "--activation", "silu", *output],
                    "plot": ["plot", str(file), "-o", str(file.parent / "plot.svg")],
                }[what]
            case "samples":
                flag = ("--samples", "--expected", "--targets")[seed % 3]
                samples = [] if flag == "--samples" else ["--samples", str(self._samples)]
                what = "export"
                words = [str(self._honest), "--activation", "silu", *samples, flag, str(file)]
                words += output
            case "report":
                what, words = "plot", ["plot", str(file), "-o", str(file.parent / "plot.svg")]
            case _:
                version = file.parent / "m" / "1"
                version.mkdir(parents=True)
                file.rename(version / MANIFEST_FILE)
                return lambda: _load(version), "load"
        return lambda: export_main(words), what

    def _fork(self, command: Callable[[], int], told: Path) -> tuple[int, float, int, str]:
        """Run a command in a process of its own.

        Returns:
            Its exit code, the seconds of a processor that it took, its largest memory in kB, and
            what it printed.
        """
        child = os.fork()
        if child == 0:
            code = 70
            try:
                out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                signal.alarm(_KILLED_S)
                with suppress(SystemExit):
                    code = command()
            except BaseException as error:  # as the interpreter would
                sys.excepthook(type(error), error, error.__traceback__)
            finally:
                with suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status, used = os.wait4(child, 0)
        seconds = used.ru_utime + used.ru_stime
        printed = told.read_text(errors="backslashreplace") if told.exists() else ""
        return os.waitstatus_to_exitcode(status), seconds, used.ru_maxrss, printed


def _load(version: Path) -> int:
    def refuse(*_: object) -> None:
        raise AssertionError("a hostile bundle got as far as its model")

    try:
        load_bundle(BundleFolder("m", 1, version), refuse, Limits(1, 0.0, 1, 1))  # type: ignore[arg-type]
    except BundleError as error:
        print(f"error: {error!s}")
        return 1
    return 0


def run(harness: Harness, files: int, seed: int, jobs: int) -> list[Outcome]:
    """Try so many files, at most one of each kind."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda name: harness.try_file(name, seed), list(KINDS)[:files]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument(
        "--files", type=int, default=2000, help="how many (2000); 0: one of each kind"
    )
    parser.add_argument("--seconds", type=float, help="go on so long instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first of each kind (0)")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (2)")
    parser.add_argument("--only", help="kinds whose name has this in it")
    parser.add_argument("--fast", action="store_true", help="leave out what takes a moment")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name, kind in list(KINDS.items()):
        if (arguments.only or "") not in name or (arguments.fast and kind.slow):
            del KINDS[name]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        files = arguments.files or len(KINDS)
        end = time.monotonic() + (arguments.seconds or math.inf)
        seed = arguments.seed
        while (arguments.seconds or len(outcomes) < files) and time.monotonic() < end:
            left = len(KINDS) if arguments.seconds else files - len(outcomes)
            outcomes += run(harness, left, seed, arguments.jobs)
            seed += 1
            wrong = sum(bool(outcome.faults) for outcome in outcomes)
            print(f"{len(outcomes):,} files, {wrong} wrong", file=sys.stderr, flush=True)
    _print_table(outcomes)
    return 1 if any(outcome.faults for outcome in outcomes) else 0


def _print_table(outcomes: Sequence[Outcome]) -> None:
    print(f"{'kind':<42}{'files':>6}{'refused':>9}{'longest':>9}{'largest':>9}  faults")
    for name in KINDS:
        own = [outcome for outcome in outcomes if outcome.kind == name]
        if not own:
            continue
        faults = sorted({fault for outcome in own for fault in outcome.faults})
        print(
            f"{name:<42}{len(own):>6}{sum(not o.passed for o in own):>9}"
            f"{max(o.seconds for o in own):>7.1f} s{max(o.megabytes for o in own):>6.0f} MB"
            f"  {', '.join(faults)}"
        )
        for outcome in [o for o in own if o.faults][:2]:
            print(f"    {outcome.faults}: {outcome.told[-600:]!a}")
    wrong = sum(bool(outcome.faults) for outcome in outcomes)
    kinds = len({outcome.kind for outcome in outcomes})
    print(
        f"{len(outcomes):,} files of {kinds} kinds: {wrong} not refused as they must be; longest "
        f"{max(o.seconds for o in outcomes):.1f} s, largest "
        f"{max(o.megabytes for o in outcomes):.0f} MB above a run that opens nothing"
    )


if __name__ == "__main__":
    sys.exit(main())
