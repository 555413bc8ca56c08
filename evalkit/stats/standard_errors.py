"""Means over features, with standard errors that account for judgements sharing a feature or a window.

Pure. Takes the per-feature scores and influences of ``evalkit.stats.metrics``; knows nothing of dictionaries, the
formulas of metrics, or data frames. A standard error here contains the spread over features and windows, not the one
between training seeds.

Source: Cameron, Gelbach & Miller 2011, "Robust inference with multiway clustering", J. Business & Economic Statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evalkit.stats.metrics import Scores

__all__ = ["Estimate", "difference", "macro_mean", "paired_difference", "two_way_variance"]

ROUNDING = 1e-12  # rounding of sums of scores: smaller errors count as zero
Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``n`` features, its standard error and 95% interval (Student t with ``df`` degrees of freedom).

    The interval of a bounded score is symmetric on the scale of log((mean − least)/(most − mean)), of which ``se`` is
    carried over by the delta method: the nearer a mean is to its bound, the more skewed it is, and symmetric intervals
    of a mean of 0.95 covered 92% in simulations. ``se`` and the interval are NaN below two features; ``mean`` is NaN
    without any.
    """

    n: int
    mean: float
    se: float
    low: float
    high: float
    df: float

    @property
    def z(self) -> float:
        """mean / se. With a standard error of zero: infinite, or NaN when the mean is zero too, but for rounding."""
        if self.se == 0:
            return math.copysign(math.inf, self.mean) if abs(self.mean) > ROUNDING else math.nan
        return self.mean / self.se


def macro_mean(scores: Scores) -> Estimate:
    """The unweighted mean over features, its standard error two-way clustered by feature and window."""
    n = len(scores.values)
    if n == 0:
        return _estimate(0, math.nan, math.nan, math.nan)
    mean = float(scores.values.mean())
    if n == 1:
        return _estimate(1, mean, math.nan, math.nan)
    judged = np.bincount(scores.feature, minlength=n)  # m_f: judgements behind each score
    deviation = (scores.values - mean) / judged
    u = (scores.influence + deviation[scores.feature]) / n
    variance = two_way_variance(u, scores.feature, scores.window)
    return _estimate(n, mean, math.sqrt(variance) if variance > ROUNDING**2 else 0.0, n - 1, scores.bounds)


def two_way_variance(u: Floats, feature: Ints, window: NDArray[Any]) -> float:
    """Variance of Σu, clustered by feature and by window: V_feature + V_window − V_both, never below V_feature.

    ``u``, ``feature`` and ``window`` are (judgement,). A judgement's u is its share of the estimate's error,
    u_fw = [ψ_fw + (s_f − mean)/m_f]/n, so that Σ_w u_fw = (s_f − mean)/n and V_feature alone is the textbook SE² over
    features. Each V sums, over G clusters, the square of the cluster's Σu, times G/(G − 1).

    Why the floor: V_window − V_both estimates the covariance of different features that were shown the same window.
    A hard window is hard for all of them, so in truth it is not negative; where it comes out so, that is noise, and
    subtracting noise would print an error smaller than that of features which share nothing.
    """
    pair = feature * (int(window.max()) + 1) + window if _fits(feature, window) else _codes_of_pairs(feature, window)
    by_feature = _clustered(u, feature)
    return max(by_feature, by_feature + _clustered(u, window) - _clustered(u, pair))


def _fits(feature: Ints, window: NDArray[Any]) -> bool:
    """Whether (feature, window) fits one int64 exactly."""
    return bool(window.min() >= 0) and (int(feature.max()) + 1) * (int(window.max()) + 1) < 2**62


def _codes_of_pairs(feature: Ints, window: NDArray[Any]) -> Ints:
    codes = np.unique(window, return_inverse=True)[1].astype(np.int64)
    return feature * (int(codes.max()) + 1) + codes


def _clustered(u: Floats, cluster: NDArray[Any]) -> float:
    """Σ_g (Σ_{i in g} u_i)² · G/(G − 1); without the factor when there is one cluster."""
    sums = np.bincount(np.unique(cluster, return_inverse=True)[1], u)
    n = len(sums)
    return float(sums @ sums) * (n / (n - 1) if n > 1 else 1.0)


def paired_difference(first: Scores, second: Scores) -> Estimate:
    """The mean of first − second over the features that have both scores, with its own two-way clustered error.

    A window shown for a feature in both counts as one observation of the difference, so what the two share cancels.
    """
    common, left, right = np.intersect1d(first.features, second.features, assume_unique=True, return_indices=True)
    ours, theirs = _rows_of(first, left, len(common)), _rows_of(second, right, len(common))
    return macro_mean(
        Scores(
            features=common,
            values=first.values[left] - second.values[right],
            feature=np.concatenate([ours[0], theirs[0]]),
            window=np.concatenate([ours[1], theirs[1]]),
            influence=np.concatenate([ours[2], -theirs[2]]),
            n_unscored=first.n_unscored + second.n_unscored,
            n_one_class=0,
        )
    )


def _rows_of(scores: Scores, kept: NDArray[np.intp], n: int) -> tuple[Ints, Ints, Floats]:
    """Feature (renumbered along ``kept``), window and influence of the judgements of the kept features."""
    position = np.full(len(scores.features), -1, np.int64)
    position[kept] = np.arange(n)
    rows = position[scores.feature] >= 0
    return position[scores.feature[rows]], scores.window[rows], scores.influence[rows]


def difference(first: Scores, second: Scores, *, paired: bool) -> Estimate:
    """Mean of first minus mean of second, between two rows of a table.

    ``paired``: the same feature ids stand for the same features in both (two explainers of one dictionary, one token's
    RQAE feature at two depths). Otherwise Welch: the two errors add in square, Welch–Satterthwaite degrees of freedom.
    Welch ignores windows that both rows share; sharing makes the true error smaller, so it errs on the wide side.
    """
    if paired:
        return paired_difference(first, second)
    a, b = macro_mean(first), macro_mean(second)
    variance = a.se**2 + b.se**2
    spread = a.se**4 / a.df + b.se**4 / b.df
    df = variance**2 / spread if spread else a.df + b.df
    return _estimate(a.n + b.n, a.mean - b.mean, math.sqrt(variance), df)


def _estimate(n: int, mean: float, se: float, df: float, bounds: tuple[float, float] | None = None) -> Estimate:
    half = float(stats.t.ppf(0.975, df)) * se
    if bounds is None or not bounds[0] + ROUNDING < mean < bounds[1] - ROUNDING:
        return Estimate(n, mean, se, mean - half, mean + half, df)
    least, most = bounds
    odds = (mean - least) / (most - mean)
    factor = math.exp(min(half * (most - least) / ((mean - least) * (most - mean)), 700))
    low, high = (least + (most - least) * one / (1 + one) for one in (odds / factor, odds * factor))
    return Estimate(n, mean, se, low, high, df)
