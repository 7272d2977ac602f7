"""Tables of an export and of an inspection, for 80 columns and for more."""

import io
import math
from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from export.inputs import shown
from export.network import Network
from export.proof.parity import Measurement
from export.sparsity import Sparsity
from export.wording import (
    ROWS,
    change_sentence,
    expected_sentence,
    largest_excess,
    percent,
    score_words,
    size,
)
from kan_bundle.escaping import escape
from kan_bundle.manifest import LayerRecord, Manifest, PruningRecord
from kan_bundle.scores import ScoreRecord, TargetsRecord
from kan_model.inspection import Inspection, LayerFacts
from kan_model.stacks import listed, printable

_MOST_LISTED = 12
_UNFUSED = ": fewer bits do not run fused, so on CPU they are slower where kan_ops is"
_WIDE = 104  # columns that the whole table of a parity takes


def found_lines(network: Network, layers: Sequence[LayerRecord]) -> list[str]:
    """Say what the layers are and how they are written, and what goes in and comes out."""
    lines = []
    for layer in layers:
        scaler = "with" if layer.standalone_scaler else "without"
        node = "" if layer.operator is None else f", the body of one {layer.operator}"
        lines += [
            f"{layer.name}: {layer.in_features} -> {layer.out_features}, {layer.grid} grid of "
            f"{layer.grid_size}, order {layer.spline_order}, {scaler} standalone scaler, "
            f"{layer.base_activation}",
            f"    written as {layer.lowering}{node}; in float32 off by {layer.lowering_error:.1e} "
            f"(eager by {layer.eager_error:.1e})",
        ]
    for kind, specs in (("input", network.inputs.specs), ("output", network.outputs)):
        for spec in specs:
            name = kind if spec.name == kind else f"{kind} {spec.name}"
            lines.append(f"{name}: {spec.datatype} {shown(spec.shape)}")
    return lines


def parity(
    measurements: Sequence[Measurement],
    reference: str,
    width: int,
    *,
    far: bool = False,
) -> tuple[RenderableType, ...]:
    """Show how far each runtime is from the reference.

    Args:
        measurements: One for each runtime.
        reference: What they were compared with.
        width: Columns there are; where they are few, some figures are left to the manifest.
        far: Whether there are probes far outside of a grid.
    """
    wide = width >= _WIDE
    runtimes = len(measurements) - 1
    title = f"Distance from {reference}: eager, and {runtimes} runtimes"
    table = _table(title=title, title_justify="left")
    table.add_column("runtime", no_wrap=True)
    columns = {
        "rows": True,
        "max abs": True,
        "max rel": wide,
        "max ULP": True,
        "from eager": wide,
        "of allowed": True,
    }
    for header in (header for header, there in columns.items() if there):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for m in measurements:
        values = (
            str(m.rows),
            f"{m.max_absolute:.2e}",
            f"{m.max_relative:.2e}",
            f"{m.max_ulp:.3g}",
            f"{m.max_from_eager:.2e}",
            percent(m.excess) if math.isfinite(m.excess) else "NaN",
        )
        right = Text("equal", style="green")
        table.add_row(
            m.runtime,
            *(value for value, there in zip(values, columns.values(), strict=True) if there),
            right if m.passed else Text("DIFFERS", style="bold red"),
        )
    relative = "max rel is |y - y64| / max(1, |y64|); " if wide else ""
    units = "ULPs are float32's, at y64"
    allowed = "allowed is what float32's noise explains, and seldom over 1e-5 of an output's size"
    beyond = (
        "\ninputs lie up to 10^6 widths of the knots away, where outputs are huge, and\n"
        "so are the largest errors; each output is judged by what is allowed for it"
    )
    note = Text(f"{relative}{units}\n{allowed}{beyond if far else ''}", style="dim")
    return table, Padding(note, (0, 0, 0, 2))


def pruning_lines(pruning: PruningRecord) -> list[str]:
    """Say what was left out, and what it changes."""
    zeroed, already = pruning.zeroed, pruning.already
    before = f", of which {already:,} had no weight before" if already else ""
    share = f"{zeroed / pruning.edges:.1%}"
    lines = [f"{zeroed:,} of {pruning.edges:,} edges left out, {share}{before}:"]
    lines += [f"    {p.name}: {p.zeroed:,} of {p.edges:,}" for p in pruning.layers]
    removed = pruning.nodes_removed or ()
    if any(removed):
        kinds = ["inputs", *(f"after layers.{i}" for i in range(len(removed) - 1))]
        told = [f"{n:,} {kind}" for kind, n in zip(kinds, removed, strict=True) if n]
        lines.append(f"nodes left out: {', '.join(told)}; that is what makes it faster")
    elif zeroed:
        why = (
            "because that is done in a KAN alone, with an activation known by name"
            if pruning.nodes_removed is None
            else "because no hidden one is idle, and at most half of the inputs are"
        )
        lines.append(f"no node is taken out, {why}: it is as large as before and no faster")
    return [*lines, f"that {change_sentence(pruning.change)}"]


def scores(targets: TargetsRecord) -> tuple[RenderableType, ...]:
    """Show how good the checkpoint and the files are, side by side."""
    labels = any(score.accuracy is not None for score in targets.scores)
    output = "" if targets.output == "output" else f" of {targets.output}"
    title = f"By the targets{output}, on {targets.rows:,} rows of the samples"
    table = _table()
    table.add_column("runtime", no_wrap=True)
    for header in ("accuracy",) if labels else ("RMSE", "MAE"):
        table.add_column(header, justify="right", no_wrap=True)
    bad = any(score.not_finite for score in targets.scores)
    if bad:
        table.add_column("not finite", justify="right", no_wrap=True)
    for score in targets.scores:
        values = (
            ["" if score.accuracy is None else percent(score.accuracy)]
            if labels
            else ["" if v is None else f"{v:.4g}" for v in (score.rmse, score.mae)]
        )
        table.add_row(score.runtime, *values, *([f"{score.not_finite:,}"] if bad else []))
    return Text(title, style="italic"), table


def result(manifest: Manifest, path: str, seconds: float) -> RenderableType:
    """Sum up what was made.

    Args:
        manifest: Of the bundle.
        path: Of its version folder.
        seconds: That it took.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    fused = sum(layer.operator is not None for layer in manifest.layers)
    worst, runtimes = largest_excess(manifest)
    files = [f"{name} {size(file.size_bytes)}" for name, file in manifest.files.items()]
    pruned = "" if manifest.pruning is None else "PRUNED "
    rounded = "" if manifest.precision == "fp32" else f" in {manifest.precision}"
    of = f"the {pruned}network{rounded}"
    activations = ", ".join(dict.fromkeys(layer.base_activation for layer in manifest.layers))
    warning = ", ASSUMED: if it was another, every answer is wrong; name it with --activation"
    assumed = manifest.activation_assumed
    rows = {
        "model": f"{printable(manifest.name)}, version {manifest.version}",
        "folder": printable(path),
        "files": ", ".join(files),
        "layers": f"{len(manifest.layers)} KANLinear, "
        + (f"{fused} of them one fused node" if fused else "as standard operators")
        + ("" if manifest.precision == "fp32" else _UNFUSED),
        "activation": printable(activations) + (warning if assumed else ""),
        "parity": f"equal to {of} in {runtimes} runtimes, at most {percent(worst)} of what "
        "is allowed",
        "expected": "" if manifest.expected is None else expected_sentence(manifest.expected),
        "pruned": "" if manifest.pruning is None else change_sentence(manifest.pruning.change),
        manifest.precision: ""
        if manifest.approximation is None
        else change_sentence(manifest.approximation),
        "time": f"{seconds:.1f} s",
    }
    for key, value in rows.items():
        if value:  # what there is nothing to say of is left out
            bad = key == "activation" and assumed
            table.add_row(key, Text(value, style="bold yellow" if bad else ""))
    return Padding(table, (1, 0, 0, 2))


def following(commands: Sequence[tuple[str, str]]) -> Text:
    """Suggest what to do next, one command a line, to be copied."""
    text = Text("\n")
    for command, purpose in commands:
        text.append(f"  {purpose}\n", style="dim")
        text.append(f"    {command}\n")
    return text


def inspection(
    found: Inspection,
    sparsity: Sequence[Sparsity] = (),
    targets: Sequence[TargetsRecord] = (),
) -> str:
    """Show what a file holds, as text for stdout.

    Args:
        found: In the file.
        sparsity: What leaving edges out would do.
        targets: Scores of the checkpoint, if there are targets.
    """
    console = Console(file=io.StringIO(), highlight=False, soft_wrap=True, width=200)

    def say(line: str, before: str = "") -> None:
        console.print(before + escape(line), markup=False)

    say(f"{printable(found.file)}: {found.format}, {found.size_bytes:,} bytes")
    for kan in found.kans:
        at = f"prefix {kan.prefix!r}" if kan.prefix else "no prefix"
        say(f"{kan.kind} with {at}: {kan.parameters:,} parameters", "\n")
        if kan.layers:
            console.print(_layer_table(kan.layers))
        kinds = (("WRONG", kan.faults), ("not in the file", kan.unknown), ("note", kan.doubts))
        for label, lines in kinds:
            for line in lines:
                say(f"  {label}: {line}")
    if found.other_tensors:
        names = listed(found.other_tensors, _MOST_LISTED)
        say(f"{len(found.other_tensors)} other tensors: {names}", "\n")
    if sparsity:
        console.print(_sparsity_table(sparsity))
        for line in (*_sparsity_notes(sparsity), *_score_notes(targets)):
            say(f"  {line}")
    verdict = "takes it" if found.refused is None else f"REFUSES it: {found.refused}"
    say(f"export {verdict}", "\n")
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]


def _layer_table(layers: Sequence[LayerFacts]) -> Table:
    table = _table()
    table.add_column("layer", no_wrap=True)
    for header in ("in", "out", "grid", "order"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("knots", "range", "scaler", "activation", "type"):
        table.add_column(header, no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for layer in layers:
        ends = layer.grid_range
        table.add_row(
            Text(printable(layer.name)),
            str(layer.in_features),
            str(layer.out_features),
            str(layer.grid_size),
            str(layer.spline_order),
            layer.grid,
            f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else "not finite",
            "yes" if layer.standalone_scaler else "no",
            Text(printable(layer.base_activation or "not in the file")),
            layer.dtype,
            f"{layer.parameters:,}",
        )
    return table


def _sparsity_table(found: Sequence[Sparsity]) -> Table:
    """Show one threshold a line, in 80 columns."""
    argmax = any(s.change is not None and s.change.same_argmax is not None for s in found)
    scored = [score for s in found for record in s.targets for score in record.scores]
    labels = any(score.accuracy is not None for score in scored)
    table = _table(title="\nWhat leaving edges out would change", title_justify="left")
    headers = ["--prune", "edges", "of all", "nodes", "largest", "typical", "of size"]
    headers += ["argmax"] if argmax else []
    if scored:  # in the place of two shares, for which there is no room
        headers = [h for h in headers if h not in ("of all", "of size")]
        for record in found[0].targets:
            kind = "accuracy" if labels else "RMSE"
            headers.append(kind if len(found[0].targets) == 1 else f"{kind} {record.output}")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for s in found:
        nodes = "" if s.nodes_removed is None else f"{sum(s.nodes_removed):,}"
        cells = {"--prune": f"{s.threshold:g}", "edges": f"{s.zeroed:,}", "nodes": nodes}
        cells["of all"] = f"{s.zeroed / s.edges:.1%}"
        if s.change is None:
            table.add_row(*(cells[h] for h in headers if h in cells), "nothing is left")
            continue
        c = s.change
        cells |= {"largest": f"{c.largest:.3g}", "typical": f"{c.typical:.3g}"}
        cells["of size"] = f"{c.typical / c.size:.2%}" if c.size > 0 else ""
        cells["argmax"] = "" if c.same_argmax is None else percent(c.same_argmax)
        own = [score for record in s.targets for score in record.scores]
        table.add_row(*(cells[h] for h in headers if h in cells), *map(_score_cell, own))
    return table


def _score_cell(score: ScoreRecord) -> str:
    if score.accuracy is not None:
        return percent(score.accuracy)
    return "" if score.rmse is None else f"{score.rmse:.4g}"


def _score_notes(targets: Sequence[TargetsRecord]) -> list[str]:
    return [
        f"checkpoint{'' if len(targets) == 1 else f', {record.output}'}, on {record.rows:,} rows "
        f"of the samples: {score_words(score)}"
        for record in targets
        for score in record.scores
    ]


def _sparsity_notes(found: Sequence[Sparsity]) -> list[str]:
    change = next((s.change for s in found if s.change is not None), None)
    lines = ["edges are left out whose importance is at most that share of their layer's"]
    if any(s.nodes_removed is not None for s in found):
        lines.append("largest; nodes that are then idle go too: they make it faster, edges do not")
    else:
        lines.append("largest; nodes go from a KAN alone, so this makes nothing smaller or faster")
    if change is not None:
        lines += [
            f"changes on {change.rows:,} {ROWS[change.on]}; typical is the root mean square,",
            f"the outputs' own (size) is {change.size:.3g}",
        ]
        if change.on != "samples":
            lines.append("real rows tell more: --samples x.npy")
    return lines


def _table(title: str | None = None, title_justify: str = "left") -> Table:
    return Table(title=title, title_justify=title_justify, box=box.SIMPLE_HEAD)  # type: ignore[arg-type]
