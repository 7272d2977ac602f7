"""Where the samples lie on each KANLinear's grid: what reaches the layers, counted.

Nothing here draws.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kan_model import KANLinear

BINS = 24
"""Equal parts of a grid in which values are counted."""


@dataclass(frozen=True)
class Distribution:
    """The values of every input of a layer.

    Attributes:
        counts: In equal parts of the input's grid, shape (in, BINS).
        below: Left of the grid, shape (in,).
        above: Right of the grid, shape (in,).
        low: The smallest finite value, shape (in,); infinite where there is none.
        high: The largest.
        rows: Rows that reached the layer; what of them is not finite is counted nowhere.
    """

    counts: NDArray[np.int64]
    below: NDArray[np.int64]
    above: NDArray[np.int64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    rows: int

    @property
    def outside(self) -> NDArray[np.float64]:
        """Share of each input's values that lie outside of its grid, shape (in,)."""
        beyond = self.below + self.above
        share: NDArray[np.float64] = beyond / np.maximum(1, beyond + self.counts.sum(axis=1))
        return share

    @property
    def outside_in_all(self) -> float:
        """Share of all values that lie outside of the grid."""
        beyond = int((self.below + self.above).sum())
        return beyond / max(1, beyond + int(self.counts.sum()))


@torch.no_grad()
def distribute(layer: KANLinear, rows: Tensor) -> Distribution:
    """Count the values of every input of a layer.

    Args:
        layer: Its grid is what counts.
        rows: Of the layer's input, shape (rows, in).
    """
    x = rows.detach().double().cpu().numpy()  # (rows, in)
    grid = layer.grid.detach().double().cpu().numpy()
    low, high = grid[:, layer.spline_order], grid[:, layer.spline_order + layer.grid_size]
    finite = np.isfinite(x)
    with np.errstate(invalid="ignore", over="ignore"):
        place = (np.where(finite, x, low) - low) / (high - low)
    inside = finite & (place >= 0) & (place <= 1)
    part = np.clip(np.where(inside, place, 0) * BINS, 0, BINS - 1).astype(int)
    counts = np.zeros((x.shape[1], BINS), dtype=np.int64)
    np.add.at(counts, (np.broadcast_to(np.arange(x.shape[1]), x.shape)[inside], part[inside]), 1)
    return Distribution(
        counts=counts,
        below=(finite & (place < 0)).sum(axis=0),
        above=(finite & (place > 1)).sum(axis=0),
        low=np.where(finite, x, np.inf).min(axis=0, initial=np.inf),
        high=np.where(finite, x, -np.inf).max(axis=0, initial=-np.inf),
        rows=len(x),
    )
