"""How far the answers of a changed network are from those before: on samples, or on random rows."""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from export.answers import in_best_precision
from export.network import Arrays, Network
from export.probes import ORDINARY, make_probes
from export.proof.eager import LARGEST_BATCH, evaluate
from kan_bundle.manifest import ChangeRecord

_ROWS, _FEWEST_ROWS = 1024, 16
_NUMBERS = 2**22  # of all rows that are compared, on a network's larger side
_BATCH = 2**18  # numbers at a time


def choose_rows(network: Network) -> tuple[Arrays, Literal["samples", "grid", "random"]]:
    """Take rows of the samples, or make some within the grid of the first layer, or just some.

    Returns:
        One array for each input, shape (rows, ...), and what the rows are.
    """
    specs = network.inputs.specs
    numbers = max(sum(math.prod(s.shape[1:]) for s in own) for own in (specs, network.outputs))
    most = int(np.clip(_NUMBERS // numbers, _FEWEST_ROWS, _ROWS))
    samples = network.inputs.samples
    if samples is not None:
        chosen = np.unique(np.linspace(0, len(samples[0]) - 1, most).astype(int))
        return tuple(array[chosen] for array in samples), "samples"
    if network.leading is not None:
        layer = network.layers[network.leading]
        k = layer.spline_order
        low, high = layer.grid[:, k].numpy(), layer.grid[:, k + layer.grid_size].numpy()
        rng = np.random.default_rng(0)
        rows = rng.uniform(low, high, (most, layer.in_features)).astype(np.float32)
        return (rows.reshape(-1, *specs[0].shape[1:]),), "grid"
    probes = make_probes(network.inputs)
    return probes.take(np.isin(probes.groups, ORDINARY)).inputs, "random"


def answer(network: Network, rows: Arrays) -> NDArray[np.float64]:
    """Run a network in float64, or in float32 if it does not run in float64.

    Returns:
        All outputs of a row side by side, shape (rows, numbers).

    Raises:
        NetworkError: The network fails on the rows.
    """
    batch = int(np.clip(_BATCH // max(array[0].size for array in rows), 1, LARGEST_BATCH))
    found, _ = in_best_precision(
        network, lambda call, dtype: evaluate(call, tuple(rows), batch, dtype)
    )
    return found


def measure_change(
    network: Network,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    on: Literal["samples", "grid", "random"],
) -> ChangeRecord:
    """Measure how far answers are from those before.

    Args:
        network: That answered.
        before: From `answer`.
        after: From the changed network, at the same rows.
        on: What the rows are.
    """
    numbers = np.isfinite(before) & np.isfinite(after)
    off = np.where(numbers, after - before, 0.0)
    count = max(1, int(numbers.sum()))
    same = None
    if len(network.outputs) == 1 and len(network.outputs[0].shape) == 2 and before.shape[1] > 1:
        same = float((before.argmax(axis=1) == after.argmax(axis=1)).mean())
    return ChangeRecord(
        on=on,
        rows=len(before),
        largest=float(np.abs(off).max()),
        typical=math.sqrt(float((off**2).sum()) / count),
        size=math.sqrt(float((np.where(numbers, before, 0.0) ** 2).sum()) / count),
        same_argmax=same,
    )
