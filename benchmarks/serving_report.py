"""What was measured of servers, and what a person reads of it: tables in Markdown, and a plot."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.load import Closed
from benchmarks.servers import CONTENDERS, TWO_WORKERS
from serving.client.load import Opened

# Okabe and Ito's colours, told apart by the colour-blind too; ours is nobody else's.
STYLES: dict[str, dict[str, object]] = {
    "echo C++": {"color": "#555555", "linestyle": "--", "marker": None},
    "echo completion queue": {"color": "#777777", "linestyle": (0, (5, 1)), "marker": None},
    "echo": {"color": "#888888", "linestyle": "--", "marker": None},
    "echo 4 threads": {"color": "#888888", "linestyle": "-.", "marker": None},
    "echo asyncio": {"color": "#BBBBBB", "linestyle": ":", "marker": None},
    "kanserve": {"color": "#D55E00", "marker": "*", "markersize": 11, "linewidth": 4.0},
    "kanserve standard": {"color": "#D55E00", "marker": "o", "linestyle": ":"},
    TWO_WORKERS: {"color": "#D55E00", "marker": "d", "linestyle": "--"},
    "Triton": {"color": "#009E73", "marker": "s"},
    "MLServer": {"color": "#0072B2", "marker": "^"},
    "TorchServe": {"color": "#E69F00", "marker": "v"},
    "Ray Serve": {"color": "#56B4E9", "marker": "D"},
    "LitServe": {"color": "#CC79A7", "marker": "P"},
    "BentoML": {"color": "#000000", "marker": "X"},
}


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Args:
        widths: Of the network, from input to output.
        grid: Its grid size.
        contenders: Servers.
        rows: Rows in a request, ascending.
        rates: Requests a second of open loops with the fewest rows, ascending.
        connections: Of the client; in a closed loop each has one request under way.
        client_threads: Most requests under way in an open loop.
        seconds: Of each load.
        rounds: In each, every server is measured once.
        server_cpus: Where servers run, as taskset takes them.
        client_cpu: Where the client runs.
    """

    widths: tuple[int, ...] = (64, 64, 64, 10)
    grid: int = 5
    # Two workers on one CPU are one too many.
    contenders: tuple[str, ...] = tuple(name for name in CONTENDERS if name != TWO_WORKERS)
    rows: tuple[int, ...] = (1, 16, 256, 1024)
    rates: tuple[float, ...] = (250.0, 500.0, 1000.0, 1500.0, 2000.0, 3000.0)
    connections: int = 16
    client_threads: int = 64
    seconds: int = 3
    rounds: int = 3
    server_cpus: str = "0"
    client_cpu: int = 1


@dataclass(frozen=True)
class Measured:
    """One server in one round.

    Args:
        contender: Its name.
        closed: At saturation, by rows in a request.
        opened: By requests a second that were to be sent.
        start_s: From its start to its first right answer.
        memory_mb: The most that its processes held after a load.
        left_out: Why nothing was measured; empty if something was.
    """

    contender: str
    closed: Mapping[int, Closed] = field(default_factory=dict)
    opened: Mapping[float, Opened] = field(default_factory=dict)
    start_s: float = 0.0
    memory_mb: float = 0.0
    left_out: str = ""


@dataclass(frozen=True)
class Results:
    """All that was measured.

    Args:
        machine: What figures depend on.
        settings: What was compared.
        measured: By server and round.
        engine: Rows a second of the engine alone, by rows in a run.
    """

    machine: Mapping[str, str | int]
    settings: Settings
    measured: Sequence[Measured]
    engine: Mapping[int, float]

    def of(self, name: str) -> list[Measured]:
        """List what was measured of a server."""
        return [one for one in self.measured if one.contender == name and not one.left_out]

    @property
    def names(self) -> list[str]:
        """Servers of which something was measured, in order."""
        return [name for name in self.settings.contenders if self.of(name)]

    def middle(self, name: str, value: Callable[[Measured], float | None]) -> float | None:
        """Take the median of a value over the rounds that have it."""
        found = [v for one in self.of(name) if (v := value(one)) is not None]
        return median(found) if found else None

    def per_s(self, name: str, rows: int) -> float | None:
        """Requests a second at saturation."""
        return self.middle(name, lambda one: one.closed[rows].per_s)


def render(results: Results) -> str:
    """Render as Markdown."""
    settings = results.settings
    machine = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    lines = ["# Servers of a KAN on this machine", "", machine, ""]
    lines += [
        f"The model is {list(settings.widths)}, grid {settings.grid}, one ONNX file for all. "
        f"Servers have CPU {settings.server_cpus}, the client CPU {settings.client_cpu}. "
        f"{settings.rounds} rounds, in each of which every server is started anew, in another "
        f"order; medians of the rounds. A load lasts {settings.seconds} seconds.",
        "",
        *(f"- {name}: {CONTENDERS[name].meaning}" for name in results.names),
        "",
        "## At saturation",
        "",
        f"{settings.connections} connections (h2load), each with one request under way: requests a "
        "second (99th percentile in ms).",
        "",
        *_closed_table(results),
        "",
        *_ratios(results),
        "",
        f"## Against offered load, {min(settings.rows)} row in a request",
        "",
        "Requests sent at random moments (Poisson), whatever the server does; median / 99th / "
        "99.9th percentile of the time from when they were to be sent, in ms. The client's own "
        "Python is in it. `-`: not tried, because fewer were answered at the rate before.",
        "",
        *_open_table(results),
        "",
        "## Start and memory",
        "",
        *_start_table(results),
    ]
    left_out = {one.contender: one.left_out for one in results.measured if one.left_out}
    if left_out:
        lines += ["", "## Not measured", ""]
        lines += [f"- {name}: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a table, all but the first column to the right."""
    line = ["---", *["--:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, line, *rows)]


def _counted(rows: int) -> str:
    return f"{rows:,} row{'s' * (rows > 1)}"


def _closed_table(results: Results) -> list[str]:
    def cell(name: str, rows: int) -> str:
        per_s = results.per_s(name, rows)
        p99 = results.middle(name, lambda one: one.closed[rows].latencies.p99)
        return f"{per_s:,.0f} ({p99:.3g})"

    sizes = results.settings.rows
    head = ["server", *map(_counted, sizes)]
    return table(head, [[name, *(cell(name, rows) for rows in sizes)] for name in results.names])


def _ratios(results: Results) -> list[str]:
    lines = []
    for rows in results.settings.rows:
        ours = results.per_s("kanserve", rows)
        if ours is None:
            continue
        engine = results.engine[rows]
        rivals = {
            name: per_s
            for name in results.names
            if CONTENDERS[name].rival and (per_s := results.per_s(name, rows))
        }
        facts = [f"{ours * rows:,.0f} rows a second"]
        for floor in ("echo C++", "echo completion queue", "echo", "echo 4 threads"):
            if echo := results.per_s(floor, rows):
                facts.append(f"{ours / echo:.2f} of {floor}")
        facts.append(f"{ours * rows / engine:.2f} of the engine's {engine:,.0f} rows")
        facts += [f"{ours / per_s:.1f} times {name}" for name, per_s in rivals.items()]
        lines.append(f"- kanserve, {_counted(rows)}: {', '.join(facts)}")
    return lines


def _open_table(results: Results) -> list[str]:
    def value(name: str, rate: float, percentile: str) -> float | None:
        def of(one: Measured) -> float | None:
            found = one.opened.get(rate)
            if found is None or found.latencies is None:
                return None
            each: float = getattr(found.latencies, percentile)
            return each

        return results.middle(name, of)

    def cell(name: str, rate: float) -> str:
        found = [value(name, rate, percentile) for percentile in ("p50", "p99", "p999")]
        return " / ".join("-" if each is None else f"{each:.3g}" for each in found)

    rates = results.settings.rates
    head = ["server", *(f"{rate:,.0f}/s" for rate in rates)]
    return table(head, [[name, *(cell(name, rate) for rate in rates)] for name in results.names])


def _start_table(results: Results) -> list[str]:
    head = ["server", "start to first answer, s", "memory, MB"]
    return table(
        head,
        [
            [
                name,
                f"{results.middle(name, lambda one: one.start_s):.2f}",
                f"{results.middle(name, lambda one: one.memory_mb):,.0f}",
            ]
            for name in results.names
        ],
    )


def draw(results: Results, output: Path) -> None:
    """Draw serving.svg and serving.png: p99 against offered load, rows a second against rows."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "kanserve"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for name in results.names:
        style: dict[str, Any] = STYLES[name]
        rates = [r for r in results.settings.rates if _p99(results, name, r) is not None]
        left.plot(rates, [_p99(results, name, r) for r in rates], label=name, **style)
        sizes = results.settings.rows
        right.plot(sizes, [rows * (results.per_s(name, rows) or 0) for rows in sizes], **style)
    engine = results.engine
    right.plot(list(engine), list(engine.values()), color="#888888", linestyle=":", label="engine")
    left.set(
        yscale="log",
        xlabel="requests a second offered (Poisson), 1 row each",
        ylabel="99th percentile, ms, from when a request was to be sent",
    )
    right.set(
        xscale="log",
        yscale="log",
        xlabel="rows in a request",
        ylabel="rows a second at saturation",
    )
    right.set_xticks(results.settings.rows, map(str, results.settings.rows))
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(output / "serving.svg", metadata={"Date": None})
    figure.savefig(output / "serving.png", dpi=120)
    pyplot.close(figure)


def _p99(results: Results, name: str, rate: float) -> float | None:
    return results.middle(
        name,
        lambda one: (
            found.latencies.p99 if (found := one.opened.get(rate)) and found.latencies else None
        ),
    )
