"""What the command does, once its words are understood: ask, show progress, write the result.

rich draws progress and tables; it is in the extra `client`, and imported where it is used.
"""

import json
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kan_bundle.escaping import EscapingHook, escape
from serving.client import bench as benching
from serving.client import files
from serving.client.channel import connection_to
from serving.client.errors import ClientError, Unavailable
from serving.client.flags import reached_by
from serving.client.load import OK, Opened
from serving.client.models import ModelVersion, Tensor
from serving.client.sync import KanClient
from serving.client.tensors import count_nan_rows

if TYPE_CHECKING:
    from rich.console import Console

_SILENT_S = 1.0
_LOG_WIDTH = 120  # a file has no width of its own


def infer(arguments: Namespace) -> None:
    """Have the rows of a file answered, and write the answers."""
    console = _console(stderr=True)
    with KanClient(**reached_by(arguments), timeout_s=arguments.timeout_s) as client:
        with _told_of_waiting(arguments):
            model = client.metadata(arguments.model, arguments.version)
        output = arguments.output_tensor
        known = [spec for spec in model.outputs if output in (None, spec.name)]
        files.require_form(arguments.output, known or model.outputs)
        inputs = files.read_inputs(arguments.input, model, arguments.header)
        rows = len(next(iter(inputs.values())))
        with files.output_file(arguments.output) as stream:
            begun = time.monotonic()
            with _progress(console, rows) as advance:
                answer = client.infer_all(
                    model.name, inputs, version=arguments.version, output=output, progress=advance
                )
            took_s = time.monotonic() - begun
            files.write_outputs(stream, files.output_form(arguments.output), answer.outputs)
    told = f"{rows:,} rows in {took_s:.2f} s by {model.name!r}, version {answer.version}"
    if nan := count_nan_rows(inputs):  # and so in the answers, with exit code 0
        told += f"; {nan:,} with NaN"
    console.print(told, markup=False)


def models(arguments: Namespace) -> None:
    """List what the server knows of."""
    with KanClient(**reached_by(arguments), timeout_s=arguments.timeout_s) as client:
        with _told_of_waiting(arguments):
            versions = client.models()
        found = [_described(client, one) for one in versions]
    if arguments.json:
        print(escape(json.dumps(found)), flush=True)
        return
    table = _table("model", "version", "state", "inputs", "outputs", "reason")
    for one in found:
        table.add_row(
            one["name"],
            one["version"],
            one["state"],
            ", ".join(str(Tensor(**spec)) for spec in one["inputs"]),
            ", ".join(str(Tensor(**spec)) for spec in one["outputs"]),
            one["reason"],
        )
    _console().print(table)


def bench(arguments: Namespace) -> None:
    """Send loads, and tell how long requests took."""
    load = benching.Load(
        arguments.version,
        arguments.rows,
        arguments.rate,
        arguments.seconds,
        arguments.in_flight,
        arguments.connections,
        arguments.timeout_s,
        arguments.seed,
    )
    if arguments.plot:
        require("matplotlib")
    console = _console(stderr=True)
    way = reached_by(arguments)
    with ExitStack() as stack:
        with (
            KanClient(**way, timeout_s=arguments.timeout_s) as client,
            _told_of_waiting(arguments),
        ):
            model = client.metadata(arguments.model, arguments.version)
        payload = benching.make_payload(model, load)
        connection = connection_to(**way)
        json_file, plot = (
            stack.enter_context(files.output_file(file)) if file else None
            for file in (arguments.json, arguments.plot)
        )
        found: list[Opened] = []
        for one, rate in zip(benching.run(connection, payload, load), load.rates, strict=True):
            found.append(one)
            offered = _offered(one, rate)
            console.print(f"{offered} requests/s for {load.seconds:g} s", markup=False)
        if json_file is not None:
            benching.write_json(json_file, connection.where, model, load, found)
        if plot is not None:
            benching.draw_plot(plot, model, load, found)
    _console().print(_loads(found, load.rates))
    if not any(one.latencies for one in found):
        codes = ", ".join(sorted({code for one in found for code in one.codes})) or "none was due"
        raise Unavailable(f"{connection.where}: no request was answered ({codes})")


def require(module: str) -> None:
    """See that a package of the extra is there.

    Raises:
        ClientError: It is not.
    """
    try:
        __import__(module)
    except ImportError as error:
        raise ClientError(
            f"{module} is not installed; "
            "install kanserve's extra client: pip install '.[client]' in its checkout"
        ) from error


@contextmanager
def _told_of_waiting(arguments: Namespace) -> Iterator[None]:
    """Name the server and the longest wait, if the first answer does not come soon."""
    line = f"waiting for {arguments.address} ({arguments.timeout_s:g} s)\n"
    timer = threading.Timer(_SILENT_S, sys.stderr.write, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _described(client: KanClient, version: ModelVersion) -> dict[str, Any]:
    """Tell everything of a version, also its tensors if it is served."""
    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    if version.state == "READY":
        try:
            model = client.metadata(version.name, version.version)
            inputs, outputs = model.inputs, model.outputs
        except ClientError:
            pass  # it was served a moment ago
    return asdict(version) | {
        "inputs": [_tensor(spec) for spec in inputs],
        "outputs": [_tensor(spec) for spec in outputs],
    }


def _tensor(spec: Tensor) -> dict[str, Any]:
    """Describe a tensor, and of the rules for its values those that it has."""
    rules = ("allowed", "rejects_nan")
    return {key: value for key, value in asdict(spec).items() if key not in rules or value}


def _offered(one: Opened, rate: float) -> str:
    """Tell how many were sent, and of how many that were asked for: chance has its share."""
    return f"{one.offered_per_s:,.0f} of {rate:,.10g}"


def _loads(found: Sequence[Opened], rates: Sequence[float]) -> Any:
    title = "offered of --rate, /s"
    table = _table(title, "answered/s", "p50, ms", "p99, ms", "p99.9, ms", "errors")
    for one, rate in zip(found, rates, strict=True):
        errors = ", ".join(f"{n} {code}" for code, n in sorted(one.codes.items()) if code != OK)
        times = one.latencies
        shown = ("-",) * 3 if times is None else (times.p50, times.p99, times.p999)
        table.add_row(
            _offered(one, rate),
            f"{one.per_s:,.0f}",
            *(t if isinstance(t, str) else f"{t:.3g}" for t in shown),
            errors or "none",
        )
    return table


def _console(*, stderr: bool = False) -> "Console":
    require("rich")
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.push_render_hook(EscapingHook())  # type: ignore[arg-type]  # names are the server's
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    return console


def _table(*columns: str) -> Any:
    require("rich")
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD)


@contextmanager
def _progress(console: "Console", rows: int) -> Iterator[Callable[[int], object]]:
    """Show how many rows are done, on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), "rows", TimeRemainingColumn())
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("rows", total=rows)
        yield lambda done: progress.advance(task, done)
