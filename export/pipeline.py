"""The stages of an export, top to bottom.

Everything is written to a staging folder and compared there, from the files as written; only a
bundle that passed becomes visible in the repository.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

import kan_ops
from export.answers import Answers, check_answers
from export.benchmark import Benchmark, benchmark
from export.change import answer, choose_rows, measure_change
from export.contract import describe_layers, make_manifest, metadata_props
from export.conversion.lowering import LoweredKANLinear, choose_forms, lower_layers
from export.conversion.nan_guard import add_nan_guard
from export.conversion.onnx_graph import write_onnx
from export.conversion.precision import COARSEST
from export.conversion.simulation import simulate
from export.conversion.torchscript import write_torchscript
from export.errors import ConversionError, InputError, ParityError, cause
from export.expected import compare_expected
from export.inputs import Inputs
from export.network import Network, describe_network, example
from export.options import Options
from export.parts import swapped
from export.proof.check import ONNXRUNTIME, TORCHSCRIPT, Runtimes, check_files, free_cycles
from export.proof.parity import choose_golden, require_tensors
from export.proof.reference import Reference, make_reference
from export.proof.verdict import require_golden, require_parity
from export.report import Report
from export.report_page.deviation import describe_deviations
from export.report_page.rendering import Exported, render_page
from export.report_page.variants import find_variants
from export.runtimes import Runner, load_eager, load_onnx, load_torchscript
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
from kan_bundle.manifest import ChangeRecord, LayerRecord, Manifest, Source, write_manifest
from kan_bundle.scores import ExpectedRecord, TargetsRecord


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
        report: Receives each stage, the measurements and the warnings.

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
        lowered = lower_layers(written, choices, options.precision)
        with swapped(written.call, lowered), report.stage(f"write {MODEL_FILE}"):
            fused = _write_onnx(written, notes, place.path, options)
        layers = tuple(
            layer if layer.name in fused else replace(layer, operator=None) for layer in layers
        )
        with swapped(written.call, lowered), report.stage(f"write {TORCHSCRIPT_FILE}"):
            omitted = _write_torchscript(written, notes, place.path, options)
        exact, approximation = network, None
        if options.precision != "fp32":
            network, approximation = _approximate(network, written, lowered, options, report)
        del lowered
        free_cycles(network)  # the converters leave some that hold every weight

        reference = _compute_reference(network, report)
        runtimes = _list_runtimes(place.path, layers, omitted is None, report)
        optional = TORCHSCRIPT if options.torchscript == "auto" else None
        checked = check_files(
            network, reference, runtimes, place.path / MODEL_FILE, add_nan_guard, report, optional
        )
        network, reference, measured = checked.network, checked.reference, checked.measured
        report.parity(
            measured,
            reference.precision,
            options.precision,
            pruned=pruning is not None,
            far=network.leading is not None,
        )
        require_parity(measured, network)
        omitted = checked.dropped.get(TORCHSCRIPT, omitted)
        if omitted is not None:
            (place.path / TORCHSCRIPT_FILE).unlink(missing_ok=True)
            runtimes = {name: load for name, load in runtimes.items() if name != TORCHSCRIPT}
            if options.torchscript == "auto":
                report.warn(f"the bundle has no {TORCHSCRIPT_FILE}: {omitted}")

        golden = choose_golden(reference)
        with report.stage("replay what the server will replay"):
            for runtime, load in runtimes.items():
                if runtime.startswith("onnxruntime"):
                    found = load()(golden.inputs)
                    require_tensors(runtime, found, network.outputs, len(golden.outputs))
                    require_golden(golden, side_by_side(found))
        targets = _score_files(network, answers, runtimes, targets, report)
        timed: Benchmark | None = None
        if options.benchmark:
            with report.stage("time every runtime"):
                all_runtimes = {"eager": lambda: load_eager(network.call), **runtimes}
                timed = benchmark(all_runtimes, reference.probes)
        write_golden(golden, place.path / GOLDEN_FILE)
        paths = sorted(place.path.iterdir())
        with report.stage("hash the files", sum(map(size_of, paths))) as advance:
            files = {file.name: record_file(file, advance) for file in paths}
        manifest = replace(
            make_manifest(
                folder, source, network, layers, options.precision, pruning, checked, files
            ),
            approximation=approximation,
            torchscript_omitted=omitted,
            activation_assumed=report.activation is not None and report.activation.assumed,
            expected=expected,
            targets=targets,
        )
        with report.stage(f"write {REPORT_FILE}"):
            manifest = _with_page(
                manifest,
                lambda: Exported(
                    manifest,
                    exact,
                    describe_deviations(network, reference, checked.found, measured),
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
    runtimes: Runtimes,
    targets: tuple[TargetsRecord, ...],
    report: Report,
) -> tuple[TargetsRecord, ...]:
    """Score what was written beside the checkpoint."""
    if answers is None or not answers.targets:
        return targets
    with report.stage("score the files", len(runtimes) * answers.rows) as advance:
        for runtime, load in runtimes.items():
            targets = score_file(network, answers, runtime, load(), targets, advance)
            free_cycles(network)  # of a runtime, before the next one is loaded
    report.scores(targets)
    return targets


def size_of(path: Path) -> int:
    """Count the bytes of a file, if it can be read."""
    return path.stat().st_size if path.is_file() else 0


def _write_onnx(
    network: Network,
    notes: Mapping[str, str],
    folder: Path,
    options: Options,
) -> frozenset[str]:
    """Write the ONNX file of a network whose layers are in their exported form.

    Returns:
        The names of the layers that are nodes of the fused operator.
    """
    return write_onnx(
        network.call,
        example(network.inputs, 2),
        [spec.name for spec in network.inputs.specs],
        [spec.name for spec in network.outputs],
        folder / MODEL_FILE,
        options.folder.name,
        notes,
        options.opset,
        inline=options.inline,
    )


def _write_torchscript(
    network: Network, notes: Mapping[str, str], folder: Path, options: Options
) -> str | None:
    """Write the TorchScript file of a network whose layers are in their exported form.

    Returns:
        Why there is none; None if there is one.

    Raises:
        ConversionError: The network cannot be converted, and TorchScript is demanded.
    """
    if options.torchscript == "off":
        return "--torchscript off"
    try:
        write_torchscript(
            network.call, example(network.inputs, 2), folder / TORCHSCRIPT_FILE, notes
        )
    except ConversionError as error:
        if options.torchscript == "on":
            raise
        return str(error)
    return None


def _approximate(
    network: Network,
    written: Network,
    lowered: Mapping[nn.Module, LoweredKANLinear],
    options: Options,
    report: Report,
) -> tuple[Network, ChangeRecord]:
    """Simulate the network with rounded weights, and measure what rounding changes.

    Raises:
        ParityError: It changes too much.
    """
    with report.stage(f"simulate {options.precision}"):
        simulated = simulate(written, lowered)
        rows, kind = choose_rows(network)
        change = measure_change(network, answer(network, rows), answer(simulated, rows), kind)
    if change.typical > COARSEST[options.precision] * change.size:
        raise ParityError(
            f"{options.precision} is too coarse for this model, nothing was published: the outputs "
            f"change by {change.typical:.3g} (root mean square), where their own size is "
            f"{change.size:.3g}; expected at most {COARSEST[options.precision]:.1%} of it. Choose "
            "a --precision of more bits"
        )
    return simulated, change


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


def _list_runtimes(
    folder: Path, layers: Sequence[LayerRecord], torchscript: bool, report: Report
) -> Runtimes:
    """List what the files of a bundle are run by here."""
    model, script = folder / MODEL_FILE, folder / TORCHSCRIPT_FILE
    runtimes: dict[str, Callable[[], Runner]] = {ONNXRUNTIME: lambda: load_onnx(model)}
    if any(layer.operator for layer in layers):
        if kan_ops.library_path() is None:
            report.warn(
                "what kan_ops computes is not compared, only what its nodes hold in standard "
                f"operators. {kan_ops.NOT_BUILT}"
            )
        else:
            runtimes[f"{ONNXRUNTIME}, fused"] = lambda: load_onnx(model, fused=True)
    if torchscript:
        runtimes[TORCHSCRIPT] = lambda: load_torchscript(script)
    return runtimes


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
