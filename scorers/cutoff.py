"""Fits the match cut-off of a judge whose confidence is not a probability.

A pure function of confidences and labels, which scorers take from windows of the explain pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["fit_cutoff"]


def fit_cutoff(confidences: Sequence[float], labels: Sequence[bool]) -> float | None:
    """The cut-off c whose rule "match if confidence > c" has the highest balanced accuracy.

    Candidates are the midpoints between neighbouring distinct confidences. If several candidates are equally good, returns
    the middle candidate, or the lower of two middle candidates. If all confidences are equal, returns that value. Returns
    None if only one of the two labels occurs.
    """
    values, truth = np.asarray(confidences, dtype=np.float64), np.asarray(labels, dtype=bool)
    if truth.all() or not truth.any():
        return None
    distinct = np.unique(values)
    if len(distinct) == 1:
        return float(distinct[0])
    # number of positives (negatives) at or below each distinct value except the last
    positives = np.searchsorted(np.sort(values[truth]), distinct[:-1], side="right")
    negatives = np.searchsorted(np.sort(values[~truth]), distinct[:-1], side="right")
    # balanced accuracy up to a factor and an offset, in integers so that ties are exact
    gain = negatives * int(truth.sum()) - positives * int((~truth).sum())
    best = np.flatnonzero(gain == gain.max())
    chosen = best[(len(best) - 1) // 2]
    low, high = float(distinct[chosen]), float(distinct[chosen + 1])
    middle = low + (high - low) / 2
    return middle if middle < high else low
