"""`kan-client bench`: how long requests take while so many a second are sent.

The inputs are random, and every request is the same one. The answers are not looked at.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import grpc
import numpy as np
from numpy.typing import NDArray

from serving.client.batches import Batch, Wanted
from serving.client.channel import INFER, Connection
from serving.client.errors import InvalidRequest
from serving.client.load import OK, Ask, Opened, open_loop, opened, poisson_moments
from serving.client.models import DTYPES, Model


@dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        version: Of the model; empty for the newest.
        rows: Of a request.
        rates: Requests a second, one load after the other.
        seconds: Of each.
        in_flight: Most requests under way; when they are, the next are late, which counts.
        connections: On which they are spread.
        timeout_s: How long each may take.
        seed: Of the inputs and the moments.
    """

    version: str
    rows: int
    rates: tuple[float, ...]
    seconds: float
    in_flight: int
    connections: int
    timeout_s: float
    seed: int


def draw_inputs(model: Model, rows: int, seed: int) -> dict[str, NDArray[Any]]:
    """Draw rows: floats from -1 to 1, whole numbers that the model accepts, else from 0 and 1.

    Raises:
        InvalidRequest: The model takes something that cannot be drawn.
    """
    generator = np.random.default_rng(seed)
    found: dict[str, NDArray[Any]] = {}
    for spec in model.inputs:
        if spec.datatype not in DTYPES:
            raise InvalidRequest(f"input {spec.name!r}: {spec.datatype} cannot be drawn at random")
        shape = (rows, *(abs(n) for n in spec.shape[1:]))  # of what may have any size, one
        dtype = DTYPES[spec.datatype]
        if dtype.kind == "f" and spec.allowed is None:
            found[spec.name] = generator.uniform(-1, 1, shape).astype(dtype)
        else:
            low, high = spec.allowed or (0, 1)
            if dtype.kind in "iu":
                low, high = max(low, np.iinfo(dtype).min), min(high, np.iinfo(dtype).max)
            drawn_as = dtype if dtype.kind in "iu" else np.dtype(np.int64)
            drawn = generator.integers(low, high, shape, drawn_as, endpoint=True)
            found[spec.name] = drawn.astype(dtype)
    return found


def make_payload(model: Model, load: Load) -> bytes:
    """Write the request.

    Raises:
        InvalidRequest: It does not fit into a message, or cannot be drawn.
    """
    inputs = draw_inputs(model, load.rows, load.seed)
    batch = Batch(model, inputs, Wanted(load.version), load.rows)
    if len(batch.parts) > 1:
        raise InvalidRequest(
            f"expected at most {model.max_rows} rows, which the server takes in one message, "
            f"found {load.rows}"
        )
    content: bytes = batch.request(batch.parts[0]).SerializeToString()
    return content


def run(connection: Connection, payload: bytes, load: Load) -> Iterator[Opened]:
    """Send every load, and tell what each has found.

    Args:
        connection: To the servers.
        payload: The request.
        load: How many, how often.
    """
    channels = [connection.open(alone=True) for _ in range(load.connections)]
    try:
        asks = [
            _asker(channel, connection, payload, load.timeout_s)
            for channel, _ in zip(itertools.cycle(channels), range(load.in_flight), strict=False)
        ]
        for ask in asks[: load.connections]:
            ask()  # connects
        for i, rate in enumerate(load.rates):
            moments = poisson_moments(rate, load.seconds, load.seed + i)
            yield opened(open_loop(asks, moments), load.seconds)
    finally:
        for channel in channels:
            channel.close()


def _asker(channel: grpc.Channel, connection: Connection, payload: bytes, timeout_s: float) -> Ask:
    call: Any = channel.unary_unary(INFER)

    def ask() -> str:
        try:
            call(payload, timeout=timeout_s, metadata=connection.metadata())
        except grpc.RpcError as error:
            return error.code().name
        return OK

    return ask


def write_json(
    stream: IO[bytes], where: str, model: Model, load: Load, found: Sequence[Opened]
) -> None:
    """Write what was sent and what came of it."""
    told = {"address": where, "model": model.name, **asdict(load)}
    told["loads"] = [asdict(one) for one in found]
    stream.write(json.dumps(told, indent=1).encode() + b"\n")


def draw_plot(stream: IO[bytes], model: Model, load: Load, found: Sequence[Opened]) -> None:
    """Draw the percentiles against the load, as SVG. matplotlib must be there."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "kanserve"
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    told = [one for one in found if one.latencies is not None]
    rates = [one.offered_per_s for one in told]
    lines = {"p50": "half", "p99": "99 in 100", "p999": "99.9 in 100"}
    for (percentile, label), colour in zip(
        lines.items(), ("#0072B2", "#D55E00", "#888888"), strict=True
    ):
        times_ms = [getattr(one.latencies, percentile) for one in told]
        axes.plot(rates, times_ms, marker="o", color=colour, label=label)
    axes.set(
        title=f"{model.name}, {load.rows} rows in a request",
        xlabel="requests a second offered (Poisson)",
        ylabel="ms, from when a request was to be sent",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="requests that take no longer", frameon=False)
    figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
