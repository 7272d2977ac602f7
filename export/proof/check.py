"""The files of a bundle against the reference: run, compared, and what is to be said about NaN."""

import ctypes
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import ExportError
from export.network import Network
from export.probes import Probes
from export.proof.nan_rows import answers_nan_by_nan, find_lossy_operators, lost_rows, rows_with_nan
from export.proof.parity import Measurement, measure, rows_to_run, run_probes
from export.proof.reference import Reference
from export.proof.verdict import summarise
from export.report import Report
from export.runtimes import Runner

ONNXRUNTIME = "onnxruntime cpu"
TORCHSCRIPT = "torchscript"

_LARGE_BYTES = 2**26  # of weights, of which a process can well hold a few

Runtimes = Mapping[str, Callable[[], Runner]]
"""What loads each runtime, by its name; one is loaded at a time, where memory is short."""


@dataclass(frozen=True)
class Checked:
    """What was compared, and how far off each runtime is.

    Attributes:
        network: As exported; inputs that must not hold NaN say so.
        reference: What is right at the probes that were compared.
        found: Answers of each runtime and of eager, shape (batch sizes, rows, numbers).
        measured: How far off these are.
        lossy: Operators of the file that answer NaN with numbers in onnxruntime.
        dropped: Why an optional runtime is left out, by its name.
    """

    network: Network
    reference: Reference
    found: Mapping[str, NDArray[np.float64]]
    measured: Sequence[Measurement]
    lossy: tuple[str, ...]
    dropped: Mapping[str, str]


def check_files(
    network: Network,
    reference: Reference,
    runtimes: Runtimes,
    model: Path,
    add_nan_guard: Callable[[Path], None],
    report: Report,
    optional: str | None = None,
) -> Checked:
    """Run every probe in every runtime, and measure the answers.

    Args:
        network: What the files should compute.
        reference: Of that network.
        runtimes: What runs the files.
        model: The ONNX file.
        add_nan_guard: Makes an ONNX file answer rows with NaN by NaN.
        report: Receives the stages and warnings.
        optional: Name of a runtime that is dropped, with the reason, if it is wrong.

    Raises:
        ParityError: A runtime fails, or returns tensors of another kind.
        ConversionError: A file cannot be loaded.
    """
    with report.stage("look for NaN that a runtime loses"):
        lossy = _find_lost_nan(network, reference, runtimes, model)
    if lossy and answers_nan_by_nan(reference):
        add_nan_guard(model)
        report.say(
            f"rows with NaN are answered by NaN, as in PyTorch, by a guard in {model.name}: "
            f"onnxruntime answers NaN with numbers in {', '.join(lossy)}"
        )
    elif lossy:
        network, reference = _reject_nan(network, reference, runtimes)
        names = ", ".join(spec.name for spec in network.inputs.specs if spec.rejects_nan)
        report.warn(
            f"rows with NaN in {names} are not compared, and the server rejects them: onnxruntime "
            f"answers NaN with numbers in {', '.join(lossy)}, and the network does not answer "
            "every such row by NaN"
        )
    found: dict[str, NDArray[np.float64]] = {"eager": reference.eager}
    dropped: dict[str, str] = {}
    total = len(runtimes) * rows_to_run(reference)
    with report.stage("compare the files as written", total) as advance:
        for runtime, load in runtimes.items():
            try:
                found[runtime] = run_probes(load(), reference, advance, runtime=runtime)
            except ExportError as error:
                if runtime != optional:
                    raise
                dropped[runtime] = str(error)
            free_cycles(network)  # of a runtime, before the next one is loaded
    scores = len(network.outputs) == 1 and len(network.outputs[0].shape) == 2
    measured = []
    for runtime, answers in found.items():
        m = measure(runtime, answers, reference, scores=scores and network.outputs[0].shape[1] > 1)
        if runtime == optional and not m.passed:
            dropped[runtime] = summarise(m)
        else:
            measured.append(m)
    found = {runtime: answers for runtime, answers in found.items() if runtime not in dropped}
    return Checked(network, reference, found, measured, lossy, dropped)


def free_cycles(network: Network) -> None:
    """Free what cycles hold of a large network, and give memory that is free back to the system.

    Looking for cycles takes a quarter of a second.
    """
    tensors = (*network.call.parameters(), *network.call.buffers())
    if sum(tensor.nbytes for tensor in tensors) > _LARGE_BYTES:
        gc.collect()
        with suppress(AttributeError, OSError):  # glibc alone keeps what was freed, and has this
            ctypes.CDLL(None).malloc_trim(0)


def _find_lost_nan(
    network: Network, reference: Reference, runtimes: Runtimes, model: Path
) -> tuple[str, ...]:
    """Find the operators that answer NaN with numbers where the network does not.

    Returns:
        None of them if no NaN is lost, or if none explains that it is: then the file is wrong.
    """
    rows = rows_with_nan(reference.probes)
    if not rows.any():
        return ()
    nan = replace(reference.take(rows), every_size=False)
    lost = lost_rows(_run_onnx(runtimes, nan), nan)
    if not lost.any():
        return ()
    given = nan.probes.take(lost).inputs
    return find_lossy_operators(model, given, list(network.layers))


def _reject_nan(
    network: Network, reference: Reference, runtimes: Runtimes
) -> tuple[Network, Reference]:
    """Let every input reject NaN in which a runtime loses it, and leave out such rows."""
    lost = lost_rows(_run_onnx(runtimes, reference), reference)
    specs, rejected = [], np.zeros_like(lost)
    for spec, array in zip(network.inputs.specs, reference.probes.inputs, strict=True):
        holds = rows_with_nan(Probes((array,), reference.probes.groups))
        rejects = bool((holds & lost).any())
        rejected |= holds & rejects
        specs.append(replace(spec, rejects_nan=rejects))
    inputs = replace(network.inputs, specs=tuple(specs))
    return replace(network, inputs=inputs), reference.take(~rejected)


def _run_onnx(runtimes: Runtimes, reference: Reference) -> NDArray[np.float64]:
    return run_probes(runtimes[ONNXRUNTIME](), reference, runtime=ONNXRUNTIME)
