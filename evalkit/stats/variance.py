"""Where the spread of feature scores comes from, and how many features it takes to tell two dictionaries apart.

Pure. Works on the per-feature scores and influences of ``evalkit.stats.metrics``. A judgement's influence is its share
of the error of its feature's score, so sums of squares of influences estimate variances of scores (see ``Spread``).
The covariance of features that share windows is not included; see ``evalkit.stats.standard_errors``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from evalkit.stats.metrics import Scores

__all__ = ["Spread", "features_needed", "spread_of"]

POWER = 0.8


@dataclass(frozen=True, slots=True)
class Spread:
    """The variance of a feature's score, split: ``features`` + ``examples`` + ``judge`` is its expectation.

    ``features``: between features with a test of infinite length; never below 0. ``examples``: from the windows that a
    test happens to show. ``judge``: from asking the same again, None where nothing was. ``n`` features, ``repeats`` of
    a question. The last two are of the tests as they were held, so ``judge`` halves when all is asked twice as often.
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
    """The split for one row; None below two features.

    With Ψ_fw = Σ_r ψ_fwr the part of window w in the error of feature f's score, asked R times: the judge's part is Σ_w
    R·s²_fw, s² the sample variance over repeats; that of the examples Σ_w Ψ²_fw · W/(W − 2) less the judge's part (two
    degrees of freedom go to the two classes' means, one where there is one class); that of the features what is left of
    the variance of scores. The method of moments of a nested analysis of variance.
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
    """Features per dictionary for 80% power to tell two means ``apart`` at the 95% level (two-sided, normal).

    ``variance`` is that of one feature's score, the same in both: n = 2·variance·(z₀.₉₇₅ + z₀.₈)²/apart².
    """
    z = float(stats.norm.ppf(0.975) + stats.norm.ppf(POWER))
    return max(2, math.ceil(2 * variance * z**2 / apart**2))
