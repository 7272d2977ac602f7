"""What a person reads of the results: the table in Markdown, and the plot."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS
from benchmarks.measuring import Entry, Memory, ModelResult, Results

# Okabe and Ito's colours, told apart by the colour-blind too. OpenVINO keeps its colour on the file
# of kanserve, whose own colour is nobody else's. The line of kanserve is wide and lies below the
# others, so that one at the same place shows on it.
STYLES: dict[str, dict[str, object]] = {
    "eager": {"color": "#000000", "marker": "o"},
    "torchscript": {"color": "#56B4E9", "marker": "s"},
    "torch.compile": {"color": "#0072B2", "marker": "^"},
    "AOTInductor": {"color": "#009E73", "marker": "v"},
    "traced": {"color": "#CC79A7", "marker": "D"},
    "openvino": {"color": "#E69F00", "marker": "P"},
    "openvino on ours": {"color": "#E69F00", "marker": "P", "linestyle": ":"},
    "kanserve torchscript": {"color": "#D55E00", "marker": "s", "linestyle": ":"},
    "kanserve": {"color": "#D55E00", "marker": "o", "linewidth": 4.0, "markersize": 7, "zorder": 2},
    "kanserve fused": {
        "color": "#D55E00",
        "marker": "*",
        "linewidth": 4.0,
        "markersize": 11,
        "zorder": 2,
    },
    "product": {"color": "#888888", "linestyle": "--", "linewidth": 1.5, "zorder": 1},
    "torch product": {"color": "#888888", "linestyle": "-", "linewidth": 1.5, "zorder": 1},
    "identity": {"color": "#BBBBBB", "linestyle": ":", "linewidth": 1.5, "zorder": 1},
}
_OURS = ("kanserve", "kanserve fused")
_RIVALS = ("eager", "traced", "torch.compile", "AOTInductor", "openvino", "openvino on ours")
_FLOORS = ("product", "torch product", "identity")


def render(results: Results) -> str:
    """Render as Markdown: the machine, then for each model a table and the ratios that matter."""
    machine = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    lines = ["# KAN inference on this machine", "", machine, ""]
    lines += [
        "Times are milliseconds for one call on a whole batch: median (99th percentile) of single "
        f"calls, all contenders in alternating rounds.{_sample_counts(results)} Error is the "
        "largest |y - y64| at any of the batch sizes. Memory is what a process holds at most above "
        "what it held before the model was loaded, at the largest batch: while it is called (until "
        "then: runtimes hold a file twice for a moment when they load it). The limit, here at the "
        "largest batch too, is the time that the multiplications of what does not vanish would "
        "take at the speed of this machine's fastest large matrix product, or the reading of their "
        "weights.",
        "",
    ]
    ran = {name for result in results.models for name in result.contenders}
    lines += [f"- {c.name}: {c.meaning}" for c in CONTENDERS.values() if c.name in ran]
    for result in results.models:
        lines += ["", f"## {result.model}", "", *_table(result), "", *_facts(result)]
    if results.skipped:
        lines += ["", "## Not measured", "", *(f"- {line}" for line in results.skipped)]
    return "\n".join(lines)


def _sample_counts(results: Results) -> str:
    counts = [entry.timing.samples for result in results.models for entry in result.entries]
    return f" {min(counts)} to {max(counts)} calls were timed for each figure." if counts else ""


def _table(result: ModelResult) -> Iterator[str]:
    times_of = [f"batch {batch}" for batch in result.batches]
    headers = ["contender", *times_of, "of limit", "error", "memory MB"]
    rows = []
    for name in result.contenders:
        entries = [result.entry(name, batch) for batch in result.batches]
        memory = result.memory.get(name)
        times = [
            f"{_digits(e.timing.median_ms)} ({_digits(e.timing.p99_ms)})" if e else "-"
            for e in entries
        ]
        found = [e for e in entries if e]
        last = entries[-1]
        share = f"{_share(result, last):.0%}" if last and name not in _FLOORS else "-"
        size = _megabytes(memory) if memory else "-"
        rows.append([name, *times, share, _error(found), size])
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for first, *others in [headers, rule, *rows]:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield f"| {' | '.join([first.ljust(widths[0]), *cells])} |"


def _megabytes(memory: Memory) -> str:
    return f"{memory.calls_bytes / 1e6:.1f} ({memory.start_bytes / 1e6:.1f})"


def _error(entries: Sequence[Entry]) -> str:
    errors = [entry.error for entry in entries if entry.error is not None]
    if not errors:
        return "-"
    wrong = "WRONG " if any(entry.wrong for entry in entries) else ""
    # max() would pass over a NaN that does not come first.
    return f"{wrong}{max(errors, key=lambda e: (e != e, e)):.1e}"


def _facts(result: ModelResult) -> Iterator[str]:
    """What the project holds itself to, per model."""
    if result.onnx_bytes is not None:
        share = result.onnx_bytes / result.weight_bytes
        yield (
            f"- model.onnx: {result.onnx_bytes:,} bytes, {share:.3f} times its folded weights "
            f"({result.weight_bytes:,} bytes)"
        )
    pairs = [(rival, ours) for ours in _OURS for rival in _RIVALS]
    pairs += [(ours, floor) for ours in _OURS for floor in _FLOORS]
    for over, under in pairs:
        ratios = list(_ratios(result, over, under))
        if ratios:
            yield f"- time of {over} / {under}: {', '.join(ratios)}"
    for ours in _OURS:
        found = [e for batch in result.batches if (e := result.entry(ours, batch))]
        if found:
            shares = (f"{_share(result, e):.0%} at batch {e.batch}" for e in found)
            yield f"- {ours}, share of the limit: {', '.join(shares)}"
    naive = result.memory.get("traced")
    for ours in _OURS:
        memory = result.memory.get(ours)
        if memory and naive:
            yield f"- peak memory of traced / {ours}: {naive.peak_bytes / memory.peak_bytes:.2f}"


def _ratios(result: ModelResult, over: str, under: str) -> Iterator[str]:
    for batch in result.batches:
        a, b = result.entry(over, batch), result.entry(under, batch)
        if a and b:
            yield f"{a.timing.median_ms / b.timing.median_ms:.2f} at batch {batch}"


def _share(result: ModelResult, entry: Entry) -> float:
    """Say which part of a call's time cannot be saved."""
    return result.limits_ms[entry.batch] / entry.timing.median_ms


def _digits(value: float) -> str:
    """Write with three significant digits, never as a power of ten."""
    for decimals, least in ((0, 100), (1, 10), (2, 1), (3, 0.1)):
        if value >= least:
            return f"{value:.{decimals}f}"
    return f"{value:.4f}"


def draw(results: Results, folder: Path) -> Sequence[Path]:
    """Plot time per row against batch size, a panel for each model, as SVG and PNG.

    Args:
        results: At least one model.
        folder: Where engine.svg and engine.png go.

    Returns:
        Their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display
    # Text as text, and no dates: a plot that has not changed is the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kanserve"})
    from matplotlib import pyplot

    rows = list(dict.fromkeys(result.model.widths for result in results.models))
    columns = list(dict.fromkeys((r.model.grid_size, r.model.knots) for r in results.models))
    size = (3.0 * len(columns) + 2.2, 2.5 * len(rows) + 0.8)
    figure, axes = pyplot.subplots(
        len(rows),
        len(columns),
        figsize=size,
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for result in results.models:
        model = result.model
        row, column = rows.index(model.widths), columns.index((model.grid_size, model.knots))
        axis = axes[row][column]
        _panel(axis, result)
        if row == 0:
            axis.set_title(f"grid {model.grid_size}, {model.knots} knots", fontsize=10)
        if column == 0:
            axis.set_ylabel(f"{' - '.join(map(str, model.widths))}\nµs per row", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("batch, rows")
    lines: dict[str, Any] = {
        line.get_label(): line for axis in axes.flat for line in axis.get_lines()
    }
    shown = [name for name in CONTENDERS if name in lines]
    figure.legend(
        [lines[name] for name in shown], shown, loc="outside right upper", frameon=False, fontsize=9
    )
    paths = [folder / "engine.svg", folder / "engine.png"]
    for path in paths:
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths


def _panel(axis: Any, result: ModelResult) -> None:
    for name in result.contenders:
        entries = [entry for batch in result.batches if (entry := result.entry(name, batch))]
        style = {"linewidth": 1.2, "markersize": 4.0, "zorder": 3} | STYLES[name]
        axis.plot(
            [entry.batch for entry in entries],
            [1e3 * entry.timing.median_ms / entry.batch for entry in entries],
            label=name,
            **style,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(result.batches, [str(batch) for batch in result.batches])
    axis.minorticks_off()
    axis.grid(True, color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
