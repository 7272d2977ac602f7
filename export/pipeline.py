"""The stages of an export, top to bottom.

Everything is written to a staging folder and compared there, from the files as written; only a
bundle that passed becomes visible in the repository.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from export.errors import ParityError
from export.lowering import lower
from export.onnx_graph import INPUT_NAME, OUTPUT_NAME, load_onnx, write_onnx
from export.parity import Measurement, choose_golden, measure, run_probes
from export.reference import RELATIVE_TOLERANCE, make_reference
from export.report import Report
from export.torchscript import load_torchscript, write_torchscript
from export.triton import render_config
from kan_bundle import __version__
from kan_bundle.golden import write_golden
from kan_bundle.integrity import record_file
from kan_bundle.layout import (
    CONFIG_FILE,
    GOLDEN_FILE,
    MODEL_FILE,
    TORCHSCRIPT_FILE,
    BundleFolder,
    check_name,
    next_version,
    require_place,
    staging,
)
from kan_bundle.manifest import (
    FORMAT,
    FileRecord,
    InputRange,
    LayerRecord,
    Manifest,
    ParityRecord,
    Source,
    TensorSpec,
    write_manifest,
)
from kan_model import KAN, load_checkpoint, resolve_activation
from kan_model.splines import is_uniform

DEFAULT_ACTIVATION = "silu"


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and to where.

    Attributes:
        checkpoint: The file.
        output: The model repository.
        name: Model name; None takes the checkpoint's stem.
        version: Model version; None takes the next free one.
        activation: Base activation; None assumes `DEFAULT_ACTIVATION` and says so.
        force: Whether an existing version may be replaced.
    """

    checkpoint: Path
    output: Path = Path("models")
    name: str | None = None
    version: int | None = None
    activation: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """A published bundle."""

    path: Path
    manifest: Manifest


def export_checkpoint(options: ExportOptions, report: Report) -> Exported:
    """Turn a checkpoint into a verified bundle.

    Args:
        options: What and where.
        report: Is told each stage, the measurements and the warnings.

    Returns:
        The bundle, as published.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ActivationError: The base activation cannot be had.
        LayoutError: The name cannot be used or the version exists.
        ConversionError: A file could not be written as asked for, or not be run.
        ParityError: A file does not compute what the checkpoint computes.
        OSError: Something could not be written.
    """
    activation = DEFAULT_ACTIVATION if options.activation is None else options.activation
    with report.stage("read the checkpoint"):
        network = load_checkpoint(options.checkpoint, resolve_activation(activation))
        checkpoint = record_file(options.checkpoint)
    name = check_name(options.checkpoint.stem if options.name is None else options.name)
    version = options.version or next_version(options.output, name)
    target = BundleFolder(name, version, options.output / name / str(version))
    require_place(target, force=options.force)
    contract = _contract(options, target, network, activation, checkpoint)
    _say_what_was_found(report, network, contract, assumed=options.activation is None)

    lowered = lower(network)
    width = contract.layers[0].in_features
    notes = _metadata_props(contract)
    with staging(target) as place:
        model_path, script_path = place.path / MODEL_FILE, place.path / TORCHSCRIPT_FILE
        with report.stage(f"write {MODEL_FILE}"):
            write_onnx(lowered, width, model_path, name, notes)
        with report.stage(f"write {TORCHSCRIPT_FILE}"):
            write_torchscript(lowered, width, script_path, notes)

        with report.stage("compute the float64 reference"):
            reference = make_reference(network)
        with report.stage("compare the files as written"):
            outputs = {
                "eager": reference.eager,
                "onnxruntime cpu": run_probes(load_onnx(model_path), reference),
                "torchscript": run_probes(load_torchscript(script_path), reference),
            }
            measured = [measure(runtime, found, reference) for runtime, found in outputs.items()]
        report.parity(measured)
        _require_parity(measured)

        with report.stage("publish"):
            write_golden(choose_golden(reference), place.path / GOLDEN_FILE)
            manifest = replace(
                contract,
                files={path.name: record_file(path) for path in sorted(place.path.iterdir())},
                parity=tuple(_parity_record(m) for m in measured),
            )
            write_manifest(manifest, place.path)
            config = render_config(name, manifest.inputs, manifest.outputs)
            config_kept = place.publish(config, force=options.force)
    if config_kept:
        report.warn(
            f"{target.path.parent / CONFIG_FILE} differs from what this version needs and was "
            "kept; compare it before serving this folder with Triton, or rewrite it with --force"
        )
    return Exported(target.path, manifest)


def _contract(
    options: ExportOptions,
    target: BundleFolder,
    network: KAN,
    activation: str,
    checkpoint: FileRecord,
) -> Manifest:
    """Say what will be exported: the manifest without the files and the parity reached."""
    layers = _describe_layers(network)
    file = os.fsencode(options.checkpoint.name).decode(errors="replace")
    return Manifest(
        format=FORMAT,
        name=target.name,
        version=target.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=Source(file, checkpoint.sha256),
        base_activation=activation,
        layers=layers,
        input_range=_input_range(network),
        inputs=(TensorSpec(INPUT_NAME, "FP32", (-1, layers[0].in_features)),),
        outputs=(TensorSpec(OUTPUT_NAME, "FP32", (-1, layers[-1].out_features)),),
        files={},
        parity=(),
        versions=_versions(),
    )


def _describe_layers(network: KAN) -> tuple[LayerRecord, ...]:
    return tuple(
        LayerRecord(
            in_features=layer.in_features,
            out_features=layer.out_features,
            grid_size=layer.grid_size,
            spline_order=layer.spline_order,
            grid="uniform" if bool(is_uniform(layer.grid).all()) else "adapted",
            standalone_scaler=layer.enable_standalone_scale_spline,
            lowering="recursion",
        )
        for layer in network.layers
    )


def _say_what_was_found(report: Report, network: KAN, contract: Manifest, *, assumed: bool) -> None:
    for i, layer in enumerate(contract.layers):
        scaler = "with" if layer.standalone_scaler else "without"
        report.say(
            f"layers.{i}: {layer.in_features} -> {layer.out_features}, {layer.grid} grid of "
            f"{layer.grid_size}, order {layer.spline_order}, {scaler} standalone scaler"
        )
    report.say(f"base activation: {contract.base_activation}")
    if assumed:
        report.warn(
            "a state dict does not say which base activation was trained; "
            f"{contract.base_activation} is ASSUMED. If it was another, every answer is wrong: "
            "name it with --activation"
        )
    if network.layers[0].grid.dtype == torch.float64:
        report.warn("the checkpoint is in float64; the files are in float32, compared with float64")


def _metadata_props(contract: Manifest) -> Mapping[str, str]:
    return {
        "kanserve.version": __version__,
        "kanserve.model": contract.name,
        "kanserve.source": contract.source.file,
        "kanserve.source_sha256": contract.source.sha256,
        "kanserve.base_activation": contract.base_activation,
        "kanserve.layers": json.dumps([asdict(layer) for layer in contract.layers]),
    }


def _require_parity(measured: Sequence[Measurement]) -> None:
    """Raise for the runtime that is furthest off, if any is too far.

    Raises:
        ParityError: With the worst probe.
    """
    failed = [m for m in measured if not m.passed]
    if failed:
        m = max(failed, key=lambda m: m.excess)
        raise ParityError(
            f"{m.runtime} does not compute what the checkpoint computes, nothing was published: at "
            f"probe {m.worst.row} ({m.worst.group}, batch {m.worst.batch_size}), output "
            f"{m.worst.output}, expected {m.worst.expected!r} within {m.worst.allowed:.2e}, found "
            f"{m.worst.found!r}; please report it with the checkpoint"
        )


def _parity_record(m: Measurement) -> ParityRecord:
    return ParityRecord(
        runtime=m.runtime,
        max_absolute=m.max_absolute,
        max_relative=m.max_relative,
        max_ulp=m.max_ulp,
        tolerance=RELATIVE_TOLERANCE,
        excess=m.excess,
        probes=m.rows,
    )


def _input_range(network: KAN) -> InputRange:
    first = network.layers[0]
    k = first.spline_order
    return InputRange(
        low=tuple(first.grid[:, k].tolist()),
        high=tuple(first.grid[:, k + first.grid_size].tolist()),
    )


def _versions() -> dict[str, str]:
    found = {"kanserve": __version__, "torch": torch.__version__}
    for package in ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
