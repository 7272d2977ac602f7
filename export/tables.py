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
from export.wording import ROWS, largest_excess, percent, size
from kan_bundle.manifest import ChangeRecord, LayerRecord, Manifest, PruningRecord
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
    allowed = "allowed is 1e-5 of an output's size, or twice float32's noise if that is more"
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
    return [*lines, *_change_lines(pruning.change)]


def _change_lines(change: ChangeRecord) -> list[str]:
    same = "" if change.same_argmax is None else f", same argmax on {percent(change.same_argmax)}"
    return [
        f"change of the outputs on {change.rows:,} {ROWS[change.on]}: at most "
        f"{change.largest:.3g}, typically {change.typical:.3g}{_of_size(change)}{same}"
    ]


def _of_size(change: ChangeRecord) -> str:
    return f" ({change.typical / change.size:.2%} of their size)" if change.size > 0 else ""


def result(
    manifest: Manifest, path: str, seconds: float, *, assumed: bool = False
) -> RenderableType:
    """Sum up what was made.

    Args:
        manifest: Of the bundle.
        path: Of its version folder.
        seconds: That it took.
        assumed: Whether nobody named the base activation.
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
        "time": f"{seconds:.1f} s",
    }
    for key, value in rows.items():
        if value:  # a network without KAN layers has no activation of theirs
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


def inspection(found: Inspection, sparsity: Sequence[Sparsity] = ()) -> str:
    """Show what a file holds, as text for stdout."""
    console = Console(file=io.StringIO(), highlight=False, soft_wrap=True, width=200)
    console.print(
        f"{printable(found.file)}: {found.format}, {found.size_bytes:,} bytes", markup=False
    )
    for kan in found.kans:
        at = f"prefix {kan.prefix!r}" if kan.prefix else "no prefix"
        console.print(f"\n{kan.kind} with {at}: {kan.parameters:,} parameters", markup=False)
        if kan.layers:
            console.print(_layer_table(kan.layers))
        kinds = (("WRONG", kan.faults), ("not in the file", kan.unknown), ("note", kan.doubts))
        for label, lines in kinds:
            for line in lines:
                console.print(f"  {label}: {line}", markup=False)
    if found.other_tensors:
        names = listed(found.other_tensors, _MOST_LISTED)
        console.print(f"\n{len(found.other_tensors)} other tensors: {names}", markup=False)
    if sparsity:
        console.print(_sparsity_table(sparsity))
        for line in _sparsity_notes(sparsity):
            console.print(f"  {line}", markup=False)
    verdict = "takes it" if found.refused is None else f"REFUSES it: {found.refused}"
    console.print(f"\nexport {verdict}", markup=False)
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
    scores = any(s.change is not None and s.change.same_argmax is not None for s in found)
    table = _table(title="\nWhat leaving edges out would change", title_justify="left")
    headers = ("--prune", "edges", "of all", "nodes", "largest", "typical", "of size")
    for header in headers if not scores else (*headers, "argmax"):
        table.add_column(header, justify="right", no_wrap=True)
    for s in found:
        nodes = "" if s.nodes_removed is None else f"{sum(s.nodes_removed):,}"
        left_out = [f"{s.threshold:g}", f"{s.zeroed:,}", f"{s.zeroed / s.edges:.1%}", nodes]
        if s.change is None:
            table.add_row(*left_out, "nothing is left")
            continue
        c = s.change
        share = f"{c.typical / c.size:.2%}" if c.size > 0 else ""
        same = [] if c.same_argmax is None else [percent(c.same_argmax)]
        table.add_row(*left_out, f"{c.largest:.3g}", f"{c.typical:.3g}", share, *same)
    return table


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
            f"of size: of the outputs' own root mean square, {change.size:.3g}",
        ]
        if change.on != "samples":
            lines.append("real rows tell more: --samples x.npy")
    return lines


def _table(title: str | None = None, title_justify: str = "left") -> Table:
    return Table(title=title, title_justify=title_justify, box=box.SIMPLE_HEAD)  # type: ignore[arg-type]
