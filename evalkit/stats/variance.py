"""Splits the variance of feature scores by source, and estimates how many features a comparison of dictionaries needs.

Pure functions. Works on the per-feature scores and influences of ``evalkit.stats.metrics``. A judgement's influence is its
contribution to the error of its feature's score, so sums of squared influences estimate variances of scores (see
``Spread``). The covariance of features that share windows is left out; see ``evalkit.stats.standard_errors``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from evalkit.stats.metrics import Scores

__all__ = ["Spread", "features_needed", "spread_of"]

POWER = 0.8  # probability of detecting the difference that ``features_needed`` assumes


@dataclass(frozen=True, slots=True)
class Spread:
    """The variance of a feature's score, split into three parts whose sum estimates it.

    ``n``: number of features.
    ``repeats``: mean number of times that each question was asked.
    ``features``: variance between features, as a test of infinite length would show it; at least 0.
    ``examples``: variance from the choice of the windows in a test.
    ``judge``: variance between repeats of the same question; None if no question was repeated.

    ``examples`` and ``judge`` refer to tests of the size that was run; with twice as many repeats, ``judge`` would halve.
    """

    n: int
    repeats: float
    features: float
    examples: float
    judge: float | None

    @property
    def total(self) -> float:
        return self.features + self.examples + (self.judge or 0.0)


def spread_of(scores: Scores) -> Spread | None:
    """The split for one row of a table; None for fewer than two features.

    This is the method of moments of a nested analysis of variance. Window w, asked R times, contributes Ψ_fw = Σ_r ψ_fwr to
    the error of feature f's score. Per feature with W windows:

        judge     Σ_w R·s²_fw, where s²_fw is the sample variance of ψ_fwr over repeats
        examples  Σ_w Ψ²_fw · W/(W − 2), minus the judge's part; the means of the two classes take two degrees of
                  freedom (if there is only one class, one)
        features  the variance of the scores, minus the two parts above
    """
    n = len(scores.values)
    if n < 2:
        return None
    keys = np.stack([scores.feature, np.unique(scores.window, return_inverse=True)[1]])
    pairs, place, repeats = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
    place = place.ravel()
    sums = np.bincount(place, scores.influence)
    squares = np.bincount(place, scores.influence**2)
    windows = np.bincount(pairs[0], minlength=n)
    lost = scores.n_classes
    correction = np.where(windows > lost, windows / np.maximum(windows - lost, 1), np.nan)
    both = np.bincount(pairs[0], sums**2, n) * correction
    judge = None
    if (repeats > 1).any():
        s2 = np.where(repeats > 1, (squares - sums**2 / repeats) / np.maximum(repeats - 1, 1), 0.0)
        judge = float(np.nanmean(np.bincount(pairs[0], np.maximum(s2, 0.0) * repeats, n)))
    within = float(np.nanmean(both)) if not np.isnan(both).all() else math.nan
    between = float(scores.values.var(ddof=1))
    examples = max(0.0, within - (judge or 0.0))
    return Spread(n, float(repeats.mean()), max(0.0, between - within), examples, judge)


def features_needed(variance: float, apart: float = 0.02) -> int:
    """Features per dictionary needed to detect a difference of ``apart`` between the means of two dictionaries.

    For 80% power in a two-sided normal test at the 95% level: n = 2·variance·(z₀.₉₇₅ + z₀.₈)²/apart².
    ``variance``: variance of one feature's score, assumed equal in both dictionaries.
    """
    z = float(stats.norm.ppf(0.975) + stats.norm.ppf(POWER))
    return max(2, math.ceil(2 * variance * z**2 / apart**2))
