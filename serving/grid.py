"""Rows outside of the grid: the silent failure of KANs in production.

Beyond its knots a spline is zero, so a row that lies where no training data did gets an answer that
looks like any other. This module counts such rows. It knows numpy alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kan_bundle.manifest import InputRange


class Grid:
    """Where a model was trained: the ends of its first layer's grid.

    Args:
        ends: Per feature of the one input.
    """

    def __init__(self, ends: InputRange) -> None:
        self._low = np.array(ends.low, np.float32)
        self._high = np.array(ends.high, np.float32)
        # Inside of these every feature is inside.
        self._highest_low, self._lowest_high = self._low.max(), self._high.min()

    def count_outside(self, inputs: Sequence[NDArray[Any]]) -> int:
        """Count the rows with a feature outside of its grid, NaN included.

        Args:
            inputs: The one input, (rows, ...), as many numbers in a row as there are features.
        """
        x = inputs[0]
        if not x.size or (
            # Twice as fast for a row as `x.min()`, which comes to this.
            np.minimum.reduce(x, axis=None) >= self._highest_low
            and np.maximum.reduce(x, axis=None) <= self._lowest_high
        ):
            return 0
        x = x.reshape(len(x), len(self._low))
        return len(x) - int(((x >= self._low) & (x <= self._high)).all(axis=1).sum())
