"""The stages of an export, top to bottom.

Everything is written to a staging folder and compared there, from the files as written; only a
bundle that passed becomes visible in the repository.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

import kan_ops
from export.answers import Answers, check_answers
from export.benchmark import Benchmark, benchmark, eager_runner
from export.contract import describe_layers, make_manifest, metadata_props
from export.conversion.lowering import Choice, choose_forms, lowered
from export.conversion.onnx_graph import load_onnx, write_onnx
from export.conversion.precision import TOLERANCE
from export.conversion.torchscript import load_torchscript, write_torchscript
from export.errors import InputError, cause
from export.expected import compare_expected
from export.inputs import Inputs
from export.network import Network, describe_network, example
from export.options import Options
from export.proof.parity import (
    Measurement,
    Runner,
    choose_golden,
    measure,
    rows_to_run,
    run_probes,
    swallow_nan,
)
from export.proof.reference import Reference, make_reference
from export.proof.verdict import require_golden, require_parity
from export.report import Report
from export.report_page.deviation import describe_deviations
from export.report_page.rendering import Exported, render_page
from export.report_page.variants import find_variants
from export.scoring import CHECKPOINT, score_file, score_network
from export.sparsity import prune_network
from export.triton import render_config
from kan_bundle.golden import side_by_side, write_golden
from kan_bundle.integrity import record_file
from kan_bundle.layout import (
    CONFIG_FILE,
    GOLDEN_FILE,
    MODEL_FILE,
    REPORT_FILE,
    TORCHSCRIPT_FILE,
    staging,
)
from kan_bundle.manifest import LayerRecord, Manifest, Source, write_manifest
from kan_bundle.scores import ExpectedRecord, TargetsRecord

_Runtimes = Mapping[str, Callable[[], Runner]]
"""What loads each runtime, by its name; one is loaded at a time, where memory is short."""

_LARGE_BYTES = 2**26  # of weights, of which a process can well hold a few


def write_bundle(
    module: nn.Module,
    inputs: Inputs | None,
    answers: Answers | None,
    options: Options,
    source: Source | None,
    report: Report,
) -> Manifest:
    """Turn a network into a verified bundle.

    Args:
        module: On the CPU, in evaluation mode; nobody else may be using it.
        inputs: What it takes; None for a KAN.
        answers: What is known about the samples; None for nothing.
        options: What is asked for.
        source: The checkpoint it was read from, if it was.
        report: Is told each stage, the measurements and the warnings.

    Raises:
        ExportError: As `export_module` says.
        LayoutError: Another export published the version meanwhile.
        OSError: Something could not be written.
    """
    network = describe_network(module, inputs)
    if not network.layers and options.precision != "fp32":
        raise InputError(
            f"--precision {options.precision}: it is that of KANLinear layers, and the network has "
            "none; leave it out"
        )
    expected, targets = _use_answers(network, answers, report)
    report.warn_if_assumed()
    written, pruning = network, None
    if options.prune is not None:
        with report.stage("leave out edges"):
            network, written, pruning = prune_network(network, options.prune)
        report.pruned(pruning)
    with report.stage("choose the form of each layer"):
        choices = choose_forms(written)
    layers = describe_layers(written, choices, options.precision, inline=options.inline)
    report.found(network, layers)
    folder = options.folder
    notes = metadata_props(folder.name, source, layers, pruning)
    with staging(folder) as place:
        layers = _write_files(written, choices, layers, notes, place.path, options, report)
        _free_cycles(network)  # the converters leave some that hold every weight

        reference = _compute_reference(network, report)
        runtimes = _list_runtimes(place.path, layers, report)
        reference, found, measured = _compare(network, runtimes, reference, options, report)
        report.parity(
            measured,
            reference.precision,
            options.precision,
            pruned=pruning is not None,
            far=network.leading is not None,
        )
        require_parity(measured, network, options.precision)

        golden = choose_golden(reference)
        with report.stage("replay what the server will replay"):
            for runtime, load in runtimes.items():
                if runtime.startswith("onnxruntime"):
                    require_golden(golden, side_by_side(load()(golden.inputs)))
        targets = _score_files(network, answers, runtimes, targets, report)
        timed: Benchmark | None = None
        if options.benchmark:
            with report.stage("time every runtime"):
                all_runtimes = {"eager": lambda: eager_runner(network.call), **runtimes}
                timed = benchmark(all_runtimes, reference.probes)
        write_golden(golden, place.path / GOLDEN_FILE)
        paths = sorted(place.path.iterdir())
        with report.stage("hash the files", sum(map(size_of, paths))) as advance:
            files = {file.name: record_file(file, advance) for file in paths}
        manifest = make_manifest(
            folder, source, network, layers, options.precision, pruning, reference, measured, files
        )
        manifest = replace(
            manifest,
            activation_assumed=report.activation is not None and report.activation.assumed,
            expected=expected,
            targets=targets,
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
        config = render_config(folder.name, manifest.inputs, manifest.outputs)
        if place.keeps_config(config, force=options.force):
            report.warn(
                f"{folder.path.parent / CONFIG_FILE} differs from what this version needs and is "
                "kept; compare it before serving this folder with Triton, or rewrite it with "
                "--force"
            )
        if options.strict:
            report.refuse_warnings()
        with report.stage("publish"):
            write_manifest(manifest, place.path)
            if options.signer is not None:
                options.signer.sign(place.path)
            place.publish(config, force=options.force)
    return manifest


def _use_answers(
    network: Network, answers: Answers | None, report: Report
) -> tuple[ExpectedRecord | None, tuple[TargetsRecord, ...]]:
    """Compare a network with the answers expected, and score it by targets."""
    expected: ExpectedRecord | None = None
    targets: tuple[TargetsRecord, ...] = ()
    if answers is None:
        return expected, targets
    check_answers(answers, network.outputs)
    if answers.expected:
        with report.stage("compare with the expected answers", answers.rows) as advance:
            expected = compare_expected(network, answers, report.activation, advance)
        report.as_expected(expected)
    if answers.targets:
        with report.stage("score the checkpoint", answers.rows) as advance:
            targets = score_network(network, answers, CHECKPOINT, advance)
    return expected, targets


def _score_files(
    network: Network,
    answers: Answers | None,
    runtimes: _Runtimes,
    targets: tuple[TargetsRecord, ...],
    report: Report,
) -> tuple[TargetsRecord, ...]:
    """Score what was written beside the checkpoint."""
    if answers is None or not answers.targets:
        return targets
    with report.stage("score the files", len(runtimes) * answers.rows) as advance:
        for runtime, load in runtimes.items():
            targets = score_file(network, answers, runtime, load(), targets, advance)
            _free_cycles(network)  # of a runtime, before the next one is loaded
    report.scores(targets)
    return targets


def _free_cycles(network: Network) -> None:
    """Free what cycles hold of a large network. Looking for them takes a quarter of a second."""
    tensors = (*network.call.parameters(), *network.call.buffers())
    if sum(tensor.nbytes for tensor in tensors) > _LARGE_BYTES:
        gc.collect()


def size_of(path: Path) -> int:
    """Count the bytes of a file, if it can be read."""
    return path.stat().st_size if path.is_file() else 0


def _write_files(
    network: Network,
    choices: Mapping[str, Choice],
    layers: Sequence[LayerRecord],
    notes: Mapping[str, str],
    folder: Path,
    options: Options,
    report: Report,
) -> tuple[LayerRecord, ...]:
    """Write the two artefacts.

    Returns:
        The layers, with no operator for those that the graph does not call.
    """
    with lowered(network, choices, options.precision) as call:
        rows = example(network.inputs, 2)
        with report.stage(f"write {MODEL_FILE}"):
            fused = write_onnx(
                call,
                rows,
                [spec.name for spec in network.inputs.specs],
                [spec.name for spec in network.outputs],
                folder / MODEL_FILE,
                options.folder.name,
                notes,
                options.opset,
                inline=options.inline,
            )
        with report.stage(f"write {TORCHSCRIPT_FILE}"):
            write_torchscript(call, rows, folder / TORCHSCRIPT_FILE, notes)
    return tuple(
        layer if layer.name in fused else replace(layer, operator=None) for layer in layers
    )


def _compute_reference(network: Network, report: Report) -> Reference:
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
    return reference


def _list_runtimes(folder: Path, layers: Sequence[LayerRecord], report: Report) -> _Runtimes:
    """List what the files of a bundle are run by here."""
    model, script = folder / MODEL_FILE, folder / TORCHSCRIPT_FILE
    runtimes: dict[str, Callable[[], Runner]] = {"onnxruntime cpu": lambda: load_onnx(model)}
    if any(layer.operator for layer in layers):
        if kan_ops.library_path() is None:
            report.warn(
                "what kan_ops computes is not compared, only what its nodes hold in standard "
                f"operators. {kan_ops.NOT_BUILT}"
            )
        else:
            runtimes["onnxruntime cpu, fused"] = lambda: load_onnx(model, fused=True)
    runtimes["torchscript"] = lambda: load_torchscript(script)
    return runtimes


def _compare(
    network: Network, runtimes: _Runtimes, reference: Reference, options: Options, report: Report
) -> tuple[Reference, Mapping[str, NDArray[np.float64]], Sequence[Measurement]]:
    """Run every probe in every runtime, and measure the answers.

    Returns:
        What is right at the probes that can be compared, and of each runtime and of eager the
        answers to them and how far off they are.
    """
    found: Mapping[str, NDArray[np.float64]] = {"eager": reference.eager}
    total = len(runtimes) * rows_to_run(reference)
    with report.stage("compare the files as written", total) as advance:
        for runtime, load in runtimes.items():
            found = {**found, runtime: run_probes(load(), reference, advance)}
            _free_cycles(network)  # of a runtime, before the next one is loaded
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
    return reference, found, measured


def _with_page(
    manifest: Manifest, tell: Callable[[], Exported], folder: Path, report: Report
) -> Manifest:
    """Write the page for people into a version, and list it in the manifest.

    The files are proven by now, so nothing in a picture of them stops the export.
    """
    try:
        # A file's name may hold what is no UTF-8, and a warning tells it.
        page = render_page(tell()).encode("utf-8", "replace")
    except Exception as error:  # whatever an odd network leads to
        report.warn(
            f"{REPORT_FILE} could not be made: {cause(error)}; the bundle is complete without it"
        )
        return manifest
    path = folder / REPORT_FILE
    path.write_bytes(page)
    files = dict(manifest.files) | {REPORT_FILE: record_file(path)}
    return replace(manifest, files=dict(sorted(files.items())))
