"""The stages of an export, top to bottom.

Everything is written to a staging folder and compared there, from the files as written; only a
bundle that passed becomes visible in the repository.
"""

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

import kan_ops
from export.benchmark import Benchmark, benchmark, eager_runner
from export.building import read_network
from export.contract import describe_layers, make_manifest, metadata_props
from export.deviation import describe_deviations
from export.errors import InputError, cause
from export.inputs import Inputs, Samples, Shapes, read_inputs
from export.lowering import choose_forms, lowered
from export.network import copy_module, describe_network, example
from export.onnx_graph import DEFAULT_OPSET, check_opset, load_onnx, write_onnx
from export.page import Exported, render_page
from export.parity import (
    Runner,
    choose_golden,
    measure,
    rows_to_run,
    run_probes,
    swallow_nan,
)
from export.precision import TOLERANCE, check_precision
from export.reference import make_reference
from export.report import Report
from export.signing import Signer, read_signer
from export.sparsity import check_threshold, prune_network
from export.torchscript import load_torchscript, write_torchscript
from export.triton import render_config
from export.variants import find_variants
from export.verdict import require_golden, require_parity
from kan_bundle.golden import side_by_side, write_golden
from kan_bundle.integrity import record_file
from kan_bundle.layout import (
    CONFIG_FILE,
    GOLDEN_FILE,
    MODEL_FILE,
    REPORT_FILE,
    TORCHSCRIPT_FILE,
    BundleFolder,
    check_name,
    check_version,
    next_version,
    require_place,
    staging,
)
from kan_bundle.manifest import (
    Manifest,
    Precision,
    Source,
    write_manifest,
)


@dataclass(frozen=True)
class _Target:
    """Where a bundle goes, and whether it may replace another."""

    folder: BundleFolder
    force: bool


@dataclass(frozen=True)
class _Options:
    """How the files are written."""

    opset: int
    precision: Precision
    prune: float | None
    inline: bool
    benchmark: bool
    signer: Signer | None


def export_checkpoint(
    checkpoint: Path | str,
    *,
    output: Path | str = "models",
    name: str | None = None,
    version: int | None = None,
    activation: str | None = None,
    prefix: str | None = None,
    model: str | Callable[[], nn.Module] | None = None,
    input_shape: Shapes | None = None,
    samples: Samples | None = None,
    trust_pickle: bool = False,
    opset: int = DEFAULT_OPSET,
    precision: Precision = "fp32",
    prune: float | None = None,
    inline: bool = False,
    benchmark: bool = False,
    sign_key: Path | str | None = None,
    sign_password: str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Manifest:
    """Turn a checkpoint into a verified bundle, as `python -m export` does.

    Args:
        checkpoint: The file: a state dict, a trainer's checkpoint, a whole module, or safetensors.
        output: The model repository.
        name: Model name; None takes the file's stem.
        version: Model version; None takes the next free one.
        activation: Base activation, where the file does not tell it; None assumes
            `DEFAULT_ACTIVATION` and warns.
        prefix: The KAN to take, where the file holds several or more than a KAN.
        model: `package.module:factory`, or the function itself, which builds the network that the
            weights belong to. None for a KAN.
        input_shape: Sizes of one row of each input, as `read_inputs` takes them.
        samples: Rows of real data, as `read_inputs` takes them.
        trust_pickle: Run the code in the file. Only for files from people whose programs you run.
        opset: Version of ONNX's standard operators to write.
        precision: Of the KAN layers' weights and products; below float32 an approximation, which
            has its own tolerance (`export.precision`).
        prune: Leave out the KAN layers' edges whose importance is at most this share of the largest
            in their layer (`export.sparsity`); what is written is then another function, and is
            compared with that. None leaves out none.
        inline: Write KANLinear layers as standard operators alone, for runtimes that do not know
            model-local functions.
        benchmark: Time every runtime at several batch sizes, for the report.
        sign_key: PEM file of the private key to sign the bundle with; None leaves it unsigned.
        sign_password: What that file is encrypted with, if it is.
        force: Whether an existing version may be replaced.
        report: Is told each stage, the measurements and the warnings; None only warns.

    Returns:
        The manifest of the bundle, which lies in OUTPUT/NAME/VERSION.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ActivationError: The base activation cannot be had, or contradicts the file.
        InputError: What the network takes is not known, or does not fit it.
        NetworkError: The network cannot be built, or its weights do not fit it.
        LayoutError: The name cannot be used or the version exists.
        ConversionError: A file could not be written as asked for, or not be run.
        ParityError: A file does not compute what the checkpoint computes.
        SigningError: The key cannot be used.
        OSError: Something could not be written.
    """
    path = Path(checkpoint)
    report = report or Report.silent()
    target = _choose_target(Path(output), path.stem if name is None else name, version, force)
    signer = _choose_signer(sign_key, sign_password)
    options = _Options(
        check_opset(opset),
        check_precision(precision),
        None if prune is None else check_threshold(prune),
        inline,
        benchmark,
        signer,
    )
    inputs = read_inputs(input_shape, samples)
    with report.stage("read the checkpoint", _size(path)) as advance:
        module = read_network(
            path,
            activation=activation,
            prefix=prefix,
            model=model,
            trust_pickle=trust_pickle,
            report=report,
        )
        file = os.fsencode(path.name).decode(errors="replace")
        source = Source(file, record_file(path, advance).sha256)
    return _export(module, inputs, target, options, source, report)


def export_module(
    module: nn.Module,
    *,
    name: str,
    output: Path | str = "models",
    version: int | None = None,
    input_shape: Shapes | None = None,
    samples: Samples | None = None,
    opset: int = DEFAULT_OPSET,
    precision: Precision = "fp32",
    prune: float | None = None,
    inline: bool = False,
    benchmark: bool = False,
    sign_key: Path | str | None = None,
    sign_password: str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Manifest:
    """Turn a network that is in memory into a verified bundle.

    Args:
        module: A KAN, or any network with or without KANLinear layers, ours or another project's.
            It is copied, and not changed.
        name: Model name.
        output: As in `export_checkpoint`, as every argument below.
        version: As above.
        input_shape: As above. A KAN needs none.
        samples: As above.
        opset: As above.
        precision: As above.
        prune: As above.
        inline: As above.
        benchmark: As above.
        sign_key: As above.
        sign_password: As above.
        force: As above.
        report: As above.

    Returns:
        The manifest of the bundle, which lies in OUTPUT/NAME/VERSION.

    Raises:
        InputError: What the network takes is not known, or does not fit it.
        NetworkError: The network cannot be exported as it is.
        LayoutError: The name cannot be used or the version exists.
        ConversionError: A file could not be written as asked for, or not be run.
        ParityError: A file does not compute what the network computes.
        SigningError: The key cannot be used.
        OSError: Something could not be written.
    """
    target = _choose_target(Path(output), name, version, force)
    signer = _choose_signer(sign_key, sign_password)
    options = _Options(
        check_opset(opset),
        check_precision(precision),
        None if prune is None else check_threshold(prune),
        inline,
        benchmark,
        signer,
    )
    inputs = read_inputs(input_shape, samples)
    own = copy_module(module).cpu().eval()
    return _export(own, inputs, target, options, None, report or Report.silent())


def _choose_target(output: Path, name: str, version: int | None, force: bool) -> _Target:
    check_name(name)
    number = next_version(output, name) if version is None else check_version(version)
    folder = BundleFolder(name, number, output / name / str(number))
    require_place(folder, force=force)
    return _Target(folder, force)


def _choose_signer(key: Path | str | None, password: str | None) -> Signer | None:
    return None if key is None else read_signer(Path(key), password)


def _export(
    module: nn.Module,
    inputs: Inputs | None,
    target: _Target,
    options: _Options,
    source: Source | None,
    report: Report,
) -> Manifest:
    network = describe_network(module, inputs)
    if not network.layers and options.precision != "fp32":
        raise InputError(
            f"--precision {options.precision}: it is that of KANLinear layers, and the network has "
            "none; leave it out"
        )
    written, pruning = network, None
    if options.prune is not None:
        with report.stage("leave out edges"):
            written, pruning = prune_network(network, options.prune)
        report.pruned(pruning)
    with report.stage("choose the form of each layer"):
        choices = choose_forms(written)
    layers = describe_layers(written, choices, options.precision, inline=options.inline)
    report.found(network, layers)
    folder = target.folder
    notes = metadata_props(folder.name, source, layers, pruning)
    with staging(folder) as place:
        model_path, script_path = place.path / MODEL_FILE, place.path / TORCHSCRIPT_FILE
        with lowered(written, choices, options.precision) as call:
            rows = example(network.inputs, 2)
            with report.stage(f"write {MODEL_FILE}"):
                given = [spec.name for spec in network.inputs.specs]
                gives = [spec.name for spec in network.outputs]
                fused = write_onnx(
                    call,
                    rows,
                    given,
                    gives,
                    model_path,
                    folder.name,
                    notes,
                    options.opset,
                    inline=options.inline,
                )
            layers = tuple(
                layer if layer.name in fused else replace(layer, operator=None) for layer in layers
            )
            with report.stage(f"write {TORCHSCRIPT_FILE}"):
                write_torchscript(call, rows, script_path, notes)
        gc.collect()  # the converters leave cycles that hold every weight

        with report.stage("compute the float64 reference"):
            reference = make_reference(network)
        if reference.refused:
            report.warn(
                f"the network itself refuses inputs of the kind {', '.join(reference.refused)}; "
                "they are not compared, and the files do not refuse them"
            )
        if reference.precision != "float64":
            report.warn(
                "the network cannot run in float64, so the files are compared with its own answers "
                "in float32"
            )
        found: Mapping[str, NDArray[np.float64]] = {"eager": reference.eager}
        runtimes: dict[str, Callable[[], Runner]] = {
            "onnxruntime cpu": lambda: load_onnx(model_path)
        }
        if any(layer.operator for layer in layers):
            if kan_ops.library_path() is None:
                report.warn(
                    "what kan_ops computes is not compared, only what its nodes hold in standard "
                    f"operators. {kan_ops.NOT_BUILT}"
                )
            else:
                runtimes["onnxruntime cpu, fused"] = lambda: load_onnx(model_path, fused=True)
        runtimes["torchscript"] = lambda: load_torchscript(script_path)
        total = len(runtimes) * rows_to_run(reference)
        with report.stage("compare the files as written", total) as advance:
            for runtime, load in runtimes.items():
                found = {**found, runtime: run_probes(load(), reference, advance)}
                gc.collect()  # one runtime at a time, where memory is short
        if network.kan is None and (swallowed := swallow_nan(found, reference)).any():
            report.warn(
                f"onnxruntime gives numbers for {swallowed.sum()} inputs with NaN that the network "
                "answers with NaN, because of layers other than KANLinear; they are not compared"
            )
            reference = reference.take(~swallowed)
            found = {runtime: answers[:, ~swallowed] for runtime, answers in found.items()}
        if options.precision != "fp32":
            reference = reference.relaxed(TOLERANCE[options.precision])
        scores = len(network.outputs) == 1 and len(network.outputs[0].shape) == 2
        measured = [
            measure(runtime, answers, reference, scores=scores and network.outputs[0].shape[1] > 1)
            for runtime, answers in found.items()
        ]
        report.parity(measured, reference.precision, options.precision, pruned=pruning is not None)
        require_parity(measured, network, options.precision)

        golden = choose_golden(reference)
        with report.stage("replay what the server will replay"):
            for runtime, load in runtimes.items():
                if runtime.startswith("onnxruntime"):
                    require_golden(golden, side_by_side(load()(golden.inputs)))
        timed: Benchmark | None = None
        if options.benchmark:
            with report.stage("time every runtime"):
                all_runtimes = {"eager": lambda: eager_runner(network.call), **runtimes}
                timed = benchmark(all_runtimes, reference.probes)
        write_golden(golden, place.path / GOLDEN_FILE)
        paths = sorted(place.path.iterdir())
        with report.stage("hash the files", sum(map(_size, paths))) as advance:
            files = {file.name: record_file(file, advance) for file in paths}
        manifest = make_manifest(
            folder, source, network, layers, options.precision, pruning, reference, measured, files
        )
        with report.stage(f"write {REPORT_FILE}"):
            manifest = _with_page(
                manifest,
                lambda: Exported(
                    manifest,
                    network,
                    describe_deviations(network, reference, found, measured),
                    timed,
                    find_variants(folder, source, options.precision, pruning),
                    report.warnings,
                ),
                place.path,
                report,
            )
        with report.stage("publish"):
            write_manifest(manifest, place.path)
            if options.signer is not None:
                options.signer.sign(place.path)
            config = render_config(folder.name, manifest.inputs, manifest.outputs)
            config_kept = place.publish(config, force=target.force)
    if config_kept:
        report.warn(
            f"{folder.path.parent / CONFIG_FILE} differs from what this version needs and was "
            "kept; compare it before serving this folder with Triton, or rewrite it with --force"
        )
    return manifest


def _size(path: Path) -> int:
    """Count the bytes of a file, if it can be read."""
    return path.stat().st_size if path.is_file() else 0


def _with_page(
    manifest: Manifest, tell: Callable[[], Exported], folder: Path, report: Report
) -> Manifest:
    """Write the page for people into a version, and list it in the manifest.

    The files are proven by now, so nothing in a picture of them stops the export.
    """
    try:
        page = render_page(tell())
    except Exception as error:  # whatever an odd network leads to
        report.warn(
            f"{REPORT_FILE} could not be made: {cause(error)}; the bundle is complete without it"
        )
        return manifest
    path = folder / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    files = dict(manifest.files) | {REPORT_FILE: record_file(path)}
    return replace(manifest, files=dict(sorted(files.items())))
