"""The fraction of variance unexplained (FVU): summed squared error over summed squared distance to the mean.

Source: Gemma Scope, arXiv 2408.05147, section 4. The ``rqae`` package has its own, because it imports nothing of evalkit.
Knows tensors only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Spread", "fvu"]


class Spread:
    """Mean and summed squared distance to it, over rows that come in chunks. Sums in float64, on the rows' device.

    Chunks are merged by their means and not by Σx² - (Σx)²/n: the states of many models have a mean far larger than their
    spread, and that difference would lose their digits. Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise
    algorithm for computing sample variances", 1979, equation 2.1.
    """

    def __init__(self) -> None:
        self.n_rows = 0
        self.total = 0.0  # Σ‖x - mean‖²
        self._mean: Tensor | None = None

    def add(self, rows: Float[Tensor, "row d"]) -> None:
        """Counts the rows in."""
        if not len(rows):
            return
        exact = rows.double()
        mean = exact.mean(dim=0)
        self.total += float((exact - mean).square().sum())
        if self._mean is None:
            self.n_rows, self._mean = len(rows), mean
            return
        apart = mean - self._mean
        count = self.n_rows + len(rows)
        self.total += float(apart.square().sum()) * self.n_rows * len(rows) / count
        self._mean = self._mean + apart * (len(rows) / count)
        self.n_rows = count

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """In float64. Raises ValueError before the first row."""
        if self._mean is None:
            raise ValueError("the mean of no rows")
        return self._mean


def fvu(squared_error: float, spread: Spread) -> float:
    """Σ‖x - x̂‖² / Σ‖x - mean‖²; NaN where all rows are equal, because nothing is then left to explain."""
    return squared_error / spread.total if spread.total else math.nan
