"""How long a run takes, learned from those that have ended. No clock, no threads, as batching."""

import math

_FORGETTING = 1 / 64
"""The weight of the newest run in what is learned."""


class Pace:
    """How long a run of so many rows takes: a fixed time and a time per row.

    They are fitted by least squares to the runs that have ended, the older the less.
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows2 = self._rows_seconds = 0.0
        self._line: tuple[float, float, float | None] = (0.0, 0.0, None)

    def learn(self, rows: int, seconds: float) -> None:
        """Take in what a run took."""
        keep = 1 - _FORGETTING
        self._weight = keep * self._weight + 1
        self._rows = keep * self._rows + rows
        self._seconds = keep * self._seconds + seconds
        self._rows2 = keep * self._rows2 + rows * rows
        self._rows_seconds = keep * self._rows_seconds + rows * seconds
        self._line = self._fit()

    def expect(self, rows: float, runs: int = 1) -> float:
        """Tell how many seconds runs of so many rows together take; 0 while nothing is known."""
        if not self._weight or not runs:
            return 0.0
        mean_rows, mean_s, per_row = self._line
        each = rows / runs
        if per_row is None:  # always the same: more rows take at least as long
            return runs * mean_s * (min(1.0, each / mean_rows) if mean_rows else 1.0)
        return runs * (mean_s + per_row * (each - mean_rows))

    def rows_within(self, seconds: float) -> float:
        """Tell how many rows a run of so many seconds has; any number while nothing is known."""
        mean_rows, mean_s, per_row = self._line
        if not self._weight or per_row == 0.0:
            return math.inf
        if per_row is None:
            return mean_rows * seconds / mean_s if mean_s else math.inf
        return mean_rows + (seconds - mean_s) / per_row

    def _fit(self) -> tuple[float, float, float | None]:
        """Fit: the means, and the time per row if runs had different numbers of them."""
        mean_rows, mean_s = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows2 / self._weight - mean_rows**2
        if spread <= 1e-6 * mean_rows**2:
            return mean_rows, mean_s, None
        covariance = self._rows_seconds / self._weight - mean_rows * mean_s
        return mean_rows, mean_s, min(max(0.0, covariance / spread), mean_s / mean_rows)
