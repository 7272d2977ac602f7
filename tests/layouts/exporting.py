"""Export one layout, and run its file beside the network."""

import io
import time
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from export import ExportError, export_checkpoint, export_module
from export.report import Report
from kan_bundle.manifest import DATATYPES, Manifest
from kan_model import KanModelError
from tests.layouts.layout import Arrays, Layout


@dataclass(frozen=True)
class Outcome:
    """What became of one export.

    Attributes:
        manifest: Of the bundle; None if the export was refused.
        refusal: Why it was; None if it was not.
        cpu_s: CPU time of this process, in seconds.
        warnings: What the export warned of.
        leaked: What torch, or another library, warned of or wrote to stdout or stderr.
        error: Largest error of the ONNX file beside the eager network on rows that the export has
            not seen, as a share of the largest output; NaN if the export was refused.
    """

    manifest: Manifest | None
    refusal: str | None
    cpu_s: float
    warnings: tuple[str, ...]
    leaked: tuple[str, ...]
    error: float = float("nan")


def export_layout(layout: Layout, folder: Path) -> Outcome:
    """Export a layout into a folder as its entry says.

    Raises:
        Exception: The export ended in another way than with a bundle or one of its own errors.
    """
    report = Report(Console(file=io.StringIO()), quiet=True)
    given: dict[str, Any] = {"name": layout.name, "output": folder, "input_shape": layout.shape}
    given |= {"samples": layout.rows(), "report": report, **dict(layout.options)}
    manifest, refusal = None, None
    terminal = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as caught,
        redirect_stdout(terminal),
        redirect_stderr(terminal),
    ):
        warnings.simplefilter("ignore")
        network = layout.build()
        warnings.simplefilter("always")
        started = time.process_time()
        try:
            if layout.save is None:
                manifest = export_module(network, **given)
            else:
                path = folder / f"{layout.name}.pt"
                torch.save(layout.save(network), path)
                manifest = export_checkpoint(path, model=layout.build, **given)
        except (ExportError, KanModelError) as error:
            refusal = f"{type(error).__name__}: {error}"
    cpu_s = time.process_time() - started
    leaked = (*(str(warning.message) for warning in caught), *terminal.getvalue().splitlines())
    outcome = Outcome(manifest, refusal, cpu_s, tuple(report.warnings), leaked)
    if manifest is None:
        assert not (folder / layout.name).exists(), "a refused export leaves files"
        return outcome
    path = folder / layout.name / str(manifest.version) / "model.onnx"
    return replace(outcome, error=_error(path, network, _unseen(layout, manifest)))


def check(layout: Layout, outcome: Outcome) -> str | None:
    """Compare an outcome with what the catalogue expects.

    Returns:
        What is different; None if nothing is.
    """
    if layout.refusal is not None:
        if outcome.refusal is None:
            return f"expected a refusal with {layout.refusal!r}, found an export"
        if layout.refusal not in outcome.refusal:
            return f"expected a refusal with {layout.refusal!r}, found {outcome.refusal}"
        return None
    if outcome.manifest is None:
        return f"expected an export, found {outcome.refusal}"
    if len(outcome.manifest.layers) != layout.layers:
        return f"expected {layout.layers} KANLinear layers, found {len(outcome.manifest.layers)}"
    if not outcome.error < 1e-4:  # of the largest output: two float32 runtimes
        return f"the file is {outcome.error:.1e} off the network"
    if layout.warning is not None and not any(layout.warning in line for line in outcome.warnings):
        return f"expected a warning with {layout.warning!r}, found {outcome.warnings}"
    return None


def _unseen(layout: Layout, manifest: Manifest) -> Arrays:
    """Draw rows with another seed than the export's, or normal numbers where there are none."""
    rows = layout.rows(seed=1)
    rng = np.random.default_rng(1)
    if rows is not None:
        return {spec.name: rows[spec.name] for spec in manifest.inputs}
    return {
        spec.name: rng.standard_normal((5, *spec.shape[1:])).astype(DATATYPES[spec.datatype])
        for spec in manifest.inputs
    }


def _error(path: Path, network: nn.Module, rows: Arrays) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, dict(rows))
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in rows.items()}
    network = network.float()
    with torch.no_grad():
        try:
            answers = network(**tensors)
        except TypeError:  # the names are not those of its forward
            answers = network(*tensors.values())
    expected = [value.float().numpy() for value in _tensors(answers)]
    assert [a.shape for a in found] == [a.shape for a in expected]
    return max(_share(a, b) for a, b in zip(found, expected, strict=True))


def _tensors(answers: Any) -> list[torch.Tensor]:
    if isinstance(answers, Mapping):
        answers = tuple(answers.values())
    if isinstance(answers, torch.Tensor):
        answers = (answers,)
    return [value for value in answers if value is not None]


def _share(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
