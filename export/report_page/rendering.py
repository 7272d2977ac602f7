"""report.html: one file that tells a person what was exported, how exact and how fast it is.

The page is a template, styles and a script in the folder `assets`, put into one file that asks for
nothing else. What matters most is plain HTML; the script draws edges and inputs from the numbers
that are embedded. Everything that comes from outside (names, warnings) is escaped by the template
engine, and the page allows no script but its own, by hash.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from torch import Tensor

from export.benchmark import Benchmark
from export.curves import Array, attribution, importance, layer_curves, why_no_curves
from export.inputs import shown
from export.network import Network
from export.reaching import reaching
from export.report_page.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    draw_histogram,
    draw_scatter,
)
from export.report_page.deviation import Deviation, has_grid
from export.report_page.diagram import BOX, Diagram, make_diagram
from export.report_page.diagram import WIDTH as DIAGRAM_WIDTH
from export.report_page.distribution import distribute
from export.report_page.embedding import LayerData, embed, share_room
from export.wording import (
    change_sentence,
    expected_sentence,
    largest_excess,
    percent,
    seconds,
    size,
)
from kan_bundle.escaping import escape
from kan_bundle.layout import MODEL_FILE, WEIGHTS_FILE
from kan_bundle.manifest import Manifest, PruningRecord
from kan_model import KANLinear

_SCRIPTS = ("numbers.js", "edges.js", "inputs.js", "page.js")
_OUTSIDE = 0.01  # share of the samples' values beyond the grid from which on it is told first


@dataclass(frozen=True)
class Exported:
    """What a report tells.

    Attributes:
        manifest: Of the version, without the report's own file.
        network: In float32.
        deviations: Of each runtime.
        benchmark: Of each runtime; None if nothing was timed.
        variants: Manifests of the versions of the same checkpoint that are in the repository.
        warnings: What the user should act on.
    """

    manifest: Manifest
    network: Network
    deviations: Sequence[Deviation]
    benchmark: Benchmark | None = None
    variants: Sequence[Manifest] = ()
    warnings: Sequence[str] = ()


def render_page(exported: Exported) -> str:
    """Write the page."""
    network = exported.network
    why_not = {name: why_no_curves(layer) for name, layer in network.layers.items()}
    drawn = {name: layer for name, layer in network.layers.items() if why_not[name] is None}
    chain = network.kan is not None and len(drawn) == len(network.layers)
    layers = _describe_layers(network, drawn, chain=chain)
    style, script = _asset("report.css"), "\n".join(_asset(name) for name in _SCRIPTS)
    return _template().render(
        exported=exported,
        manifest=exported.manifest,
        verdict=_verdict(exported.manifest),
        attention=[*exported.warnings, *_pruned(exported.manifest.pruning), *_outside(layers)]
        + [_not_drawn(name, why) for name, why in why_not.items() if why is not None],
        charts=[
            (d, draw_histogram(d), draw_scatter(d, from_grid=has_grid(network)))
            for d in exported.deviations
        ],
        from_grid=has_grid(network),
        plane={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT}
        | {"top": TOP, "bottom": BOTTOM},
        speeds=_table_of_speeds(exported.benchmark),
        fastest=_fastest,
        layers=layers,
        leading=network.leading,
        diagrams=_diagrams(layers, chain=chain),
        diagram_width=DIAGRAM_WIDTH,
        box=BOX,
        variants=[_describe_variant(m) for m in _in_order(exported)],
        sampled=network.inputs.samples is not None,
        data=embed(layers, chain=chain),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
    )


def _not_drawn(name: str, why: str) -> str:
    return (
        f"the edges of {name} are not drawn: its base activation {why}, so they are no functions "
        "of one number"
    )


def _describe_layers(
    network: Network, drawn: Mapping[str, KANLinear], *, chain: bool
) -> list[LayerData]:
    """Measure layers and take of them what there is room for."""
    samples = network.inputs.samples
    reached = {} if samples is None else reaching(network, samples)
    rooms = share_room(list(drawn.values()))
    chained: list[Tensor] = []
    if chain:
        chained = [importance(layer, reached.get(n)) for n, layer in drawn.items()]
    scores = attribution([m.numpy() for m in chained]) if chained else []
    found = []
    for i, ((name, layer), room) in enumerate(zip(drawn.items(), rooms, strict=True)):
        rows = reached.get(name)
        measured = chained[i] if chained else importance(layer, rows)
        score: Array = scores[i] if chained else attribution([measured.numpy()])[0]
        curves = layer_curves(
            name,
            layer,
            measured,
            sampled=rows is not None,
            most_edges=room.edges,
            most_inputs=room.inputs,
        )
        distribution = None if rows is None else distribute(layer, rows)
        found.append(LayerData(curves, score[curves.inputs], distribution))
    return found


def _diagrams(layers: Sequence[LayerData], *, chain: bool) -> list[tuple[str, Diagram]]:
    """Draw a KAN as a whole, and the layers of another network each by itself."""
    curves = [layer.curves for layer in layers]
    if chain:
        return [("the network", make_diagram(curves))]
    return [(layer.name, make_diagram([layer])) for layer in curves]


def _pruned(pruning: PruningRecord | None) -> list[str]:
    """Say what leaving out edges changed, if any were."""
    if pruning is None:
        return []
    before = f", of which {pruning.already:,} had no weight before" if pruning.already else ""
    return [
        f"{_left_out(pruning)} were left out{before}, of importance up to {pruning.threshold:g} of "
        f"the largest in their layer: that {change_sentence(pruning.change)}"
    ]


def _left_out(pruning: PruningRecord) -> str:
    return f"{pruning.zeroed:,} of {pruning.edges:,} edges"


def _outside(layers: Sequence[LayerData]) -> list[str]:
    return [
        f"{percent(layer.distribution.outside_in_all)} of the values that reach "
        f"{layer.curves.name} with the samples lie outside of its grid, where splines fade and "
        "only the base path is left; train with update_grid, or bring inputs to the grid's range"
        for layer in layers
        if layer.distribution is not None and layer.distribution.outside_in_all > _OUTSIDE
    ]


def _verdict(manifest: Manifest) -> tuple[str, str]:
    """Say in a word and a sentence how close the files are."""
    what = manifest.source.file if manifest.source else "the network"
    name = f"Version {manifest.version} of {manifest.name}"
    without = "" if manifest.pruning is None else f" without {_left_out(manifest.pruning)}"
    records = [record for record in manifest.parity if record.runtime != "eager"]
    rows = min(record.probes for record in records)
    largest, runtimes = largest_excess(manifest)
    error = (
        f"at {rows:,} inputs the largest error in any of {runtimes} runtimes is "
        f"{percent(largest)} of what is allowed"
    )
    rounded = "" if manifest.precision == "fp32" else f" with weights in {manifest.precision}"
    return "Equal", f"{name} computes what {what} computes{without}{rounded}: {error}."


def _table_of_speeds(
    benchmark: Benchmark | None,
) -> tuple[list[int], list[tuple[str, list[float | None]]]]:
    """Give the batch sizes, and of each runtime the median seconds of each."""
    if benchmark is None:
        return [], []
    batches = sorted({speed.rows for speed in benchmark.speeds})
    found = {(speed.runtime, speed.rows): speed.median_s for speed in benchmark.speeds}
    runtimes = dict.fromkeys(speed.runtime for speed in benchmark.speeds)
    return batches, [(r, [found.get((r, rows)) for rows in batches]) for r in runtimes]


def _fastest(batches: Sequence[int], times: Sequence[float | None]) -> str:
    """Say how many rows a second a runtime gets through at the best of its batch sizes."""
    rates = [rows / time for rows, time in zip(batches, times, strict=True) if time]
    return f"{max(rates):,.0f}" if rates else "\N{EN DASH}"


def _in_order(exported: Exported) -> list[Manifest]:
    return sorted([exported.manifest, *exported.variants], key=lambda manifest: manifest.version)


def _describe_variant(manifest: Manifest) -> dict[str, object]:
    """Describe a version and the size of its model."""
    sizes = [
        manifest.files[name].size_bytes
        for name in (MODEL_FILE, WEIGHTS_FILE)
        if name in manifest.files
    ]
    return {"manifest": manifest, "size": sum(sizes)}


@cache
def _template() -> Template:
    """Compile the template, which takes as long as the rest of the page."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: escape(value, keep="\n") if type(value) is str else value,
    )
    environment.filters |= {
        "percent": percent,
        "error": lambda value: f"{value:.2e}",
        "three": lambda value: f"{value:.3g}",
        "number": lambda value: f"{value:,}",
        "size": size,
        "seconds": seconds,
        "shape": shown,
        "four": lambda value: f"{value:.4g}",
        "expected": expected_sentence,
        "change": change_sentence,
    }
    return environment.from_string(_asset("report.html"))


@cache
def _asset(name: str) -> str:
    return (files("export.report_page") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Name an inline script or style as a Content-Security-Policy does."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
