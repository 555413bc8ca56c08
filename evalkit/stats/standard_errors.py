"""Means over features, with standard errors that account for judgements that share a feature or a window.

Pure functions. Takes the per-feature scores and influences of ``evalkit.stats.metrics``; knows nothing of dictionaries, the
formulas of metrics, or data frames. The standard errors cover the variation between features and between windows, but not
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

ROUNDING = 1e-12  # rounding error of sums of scores; smaller values count as zero
Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``n`` features, its standard error and its 95% interval (Student's t with ``df`` degrees of freedom).

    The interval of a bounded score is symmetric on the logit scale, log((mean − lowest)/(highest − mean)), to which the
    delta method transforms ``se``. The reason: the distribution of a mean near a bound is skewed, and in simulations
    symmetric intervals around a mean of 0.95 covered only 92%. ``se`` and the interval are NaN for fewer than two
    features; ``mean`` is NaN for none.
    """

    n: int
    mean: float
    se: float
    low: float
    high: float
    df: float

    @property
    def z(self) -> float:
        """mean / se. If ``se`` is zero: infinite, or NaN if the mean is zero as well (up to rounding)."""
        if self.se == 0:
            return math.copysign(math.inf, self.mean) if abs(self.mean) > ROUNDING else math.nan
        return self.mean / self.se


def macro_mean(scores: Scores) -> Estimate:
    """The unweighted mean over features; its standard error is two-way clustered by feature and window."""
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
    """Variance of Σu, clustered by feature and by window: V_feature + V_window − V_both, and at least V_feature.

    ``u``, ``feature`` and ``window`` are (judgement,). A judgement's u is its contribution to the error of the estimate,
    u_fw = [ψ_fw + (s_f − mean)/m_f]/n, so that Σ_w u_fw = (s_f − mean)/n and V_feature alone is the textbook SE² over
    features. Each V is the sum over G clusters of the square of the cluster's Σu, times G/(G − 1).

    Reason for the minimum: V_window − V_both estimates the covariance of different features tested on the same window. A
    hard window is hard for all of them, so the true covariance is not negative. A negative estimate is noise, and
    subtracting it would give a smaller error than for features that share no window.
    """
    pair = feature * (int(window.max()) + 1) + window if _fits(feature, window) else _codes_of_pairs(feature, window)
    by_feature = _clustered(u, feature)
    return max(by_feature, by_feature + _clustered(u, window) - _clustered(u, pair))


def _fits(feature: Ints, window: NDArray[Any]) -> bool:
    """Whether every pair (feature, window) has a unique code in an int64."""
    return bool(window.min() >= 0) and (int(feature.max()) + 1) * (int(window.max()) + 1) < 2**62


def _codes_of_pairs(feature: Ints, window: NDArray[Any]) -> Ints:
    codes = np.unique(window, return_inverse=True)[1].astype(np.int64)
    return feature * (int(codes.max()) + 1) + codes


def _clustered(u: Floats, cluster: NDArray[Any]) -> float:
    """Σ_g (Σ_{i in g} u_i)² · G/(G − 1); without the factor if there is only one cluster."""
    sums = np.bincount(np.unique(cluster, return_inverse=True)[1], u)
    n = len(sums)
    return float(sums @ sums) * (n / (n - 1) if n > 1 else 1.0)


def paired_difference(first: Scores, second: Scores) -> Estimate:
    """The mean of first − second over the features that have both scores, with its own two-way clustered error.

    A window that tests the same feature in both is one observation of the difference, so that their shared error cancels.
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
    """Feature (as an index into ``kept``), window and influence of the judgements of the kept features."""
    position = np.full(len(scores.features), -1, np.int64)
    position[kept] = np.arange(n)
    rows = position[scores.feature] >= 0
    return position[scores.feature[rows]], scores.window[rows], scores.influence[rows]


def difference(first: Scores, second: Scores, *, paired: bool) -> Estimate:
    """Mean of first minus mean of second, for two rows of a table.

    ``paired``: whether equal feature ids mean the same feature in both, as for two explainers of one dictionary, or for
    RQAE features of the same tokens at two depths. If not, this is Welch's method: the squared errors add up, with
    Welch–Satterthwaite degrees of freedom. Welch ignores windows that both rows share; sharing makes the true error
    smaller, so the computed error is at worst too large.
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
