"""What reaches the KANLinear layers of a network with samples of its inputs.

The samples run through the network as it is, and what arrives at each layer is kept, up to a number
of rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.network import Network
from export.parts import watched
from export.quiet import captured

_MOST_ROWS = 1024
_BUDGET = 2**21  # numbers of the samples that are run, and of what is kept of one layer
_BATCH = 64


@captured()
@torch.no_grad()
def reaching(network: Network, samples: Sequence[NDArray[np.generic]]) -> Mapping[str, Tensor]:
    """Run samples through a network, and keep what reaches its KANLinear layers.

    Args:
        network: In float32.
        samples: Rows for each input; at most some thousand of them are taken, evenly.

    Returns:
        Shape (rows, in) for each layer that is reached.
    """
    elements = max(1, sum(array[0].size for array in samples))
    most = max(1, min(_MOST_ROWS, _BUDGET // elements, len(samples[0])))
    chosen = np.linspace(0, len(samples[0]) - 1, most).astype(int)
    pieces: dict[str, list[Tensor]] = {name: [] for name in network.layers}
    for start in range(0, most, _BATCH):
        rows = [torch.tensor(array[chosen[start : start + _BATCH]]) for array in samples]
        with watched(network.replaced) as reached:
            network.call(*rows)
        for name, given in reached:
            width = network.layers[name].in_features
            kept = given.reshape(-1, width)
            share = max(1, _BUDGET // width // max(1, most // _BATCH))
            pieces[name].append(kept[_evenly(len(kept), share)])
    joined = {name: torch.cat(parts) for name, parts in pieces.items() if parts}
    return {name: rows[_evenly(len(rows), _MOST_ROWS)] for name, rows in joined.items()}


@torch.no_grad()
def find_constant_inputs(
    network: Network, samples: Sequence[NDArray[np.generic]]
) -> Mapping[str, Tensor]:
    """Find the inputs of the KANLinear layers that have one value over all rows of the samples.

    Args:
        network: In float32.
        samples: Rows for each input; all of them are run.

    Returns:
        Shape (in,) for each layer that is reached.
    """
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    for start in range(0, len(samples[0]), _BATCH):
        with watched(network.replaced) as reached:
            network.call(*(torch.tensor(array[start : start + _BATCH]) for array in samples))
        for name, given in reached:
            rows = given.reshape(-1, network.layers[name].in_features).double()
            finite = rows.isfinite()  # as importance passes over the others
            least = torch.where(finite, rows, torch.inf).amin(dim=0)
            largest = torch.where(finite, rows, -torch.inf).amax(dim=0)
            low[name] = torch.minimum(low[name], least) if name in low else least
            high[name] = torch.maximum(high[name], largest) if name in high else largest
    return {name: ~(low[name] < high[name]) for name in low}


def _evenly(rows: int, most: int) -> NDArray[np.intp]:
    return np.linspace(0, rows - 1, min(rows, most)).astype(np.intp)
