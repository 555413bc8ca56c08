"""Fits the match cut-off of a judge whose confidence is not a probability, on windows of the explain pool.

Pure: takes confidences and labels, returns one number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["fit_cutoff"]


def fit_cutoff(confidences: Sequence[float], labels: Sequence[bool]) -> float | None:
    """The cut-off c whose rule "match if confidence > c" has the highest balanced accuracy.

    Candidates are the midpoints between neighbouring distinct confidences. Of several equally good candidates, the middle
    one is returned (of two middle ones, the lower). If all confidences are equal, that value is returned. Returns None if
    only one of the two labels occurs.
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
    # balanced accuracy up to constants, in integers so that ties are exact
    gain = negatives * int(truth.sum()) - positives * int((~truth).sum())
    best = np.flatnonzero(gain == gain.max())
    chosen = best[(len(best) - 1) // 2]
    low, high = float(distinct[chosen]), float(distinct[chosen + 1])
    middle = low + (high - low) / 2
    return middle if middle < high else low
