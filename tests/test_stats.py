"""Standard errors against statsmodels, a brute-force double sum, scipy's t tests, and simulated judges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as scipy_stats

from evalkit.metrics import Scores, score_features
from evalkit.stats import difference, macro_mean, paired_difference, two_way_variance


def mean_scores(y: np.ndarray, window: np.ndarray, prefix: str = "") -> Scores:
    """The plain mean of y (feature, judgement) as a metric: its influence is (y − mean)/m."""
    n, m = y.shape
    return Scores(
        features=np.array([f"{prefix}{f:04d}" for f in range(n)]),
        values=y.mean(1),
        feature=np.repeat(np.arange(n), m),
        window=window.ravel(),
        influence=((y - y.mean(1, keepdims=True)) / m).ravel(),
        n_unscored=0,
        n_one_class=0,
    )


def crossed(seed: int, n: int = 12, m: int = 9, pool: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """y (feature, judgement) with strong feature and window effects, and its windows, drawn from one pool."""
    rng = np.random.default_rng(seed)
    window = np.array([rng.choice(pool, m, replace=False) for _ in range(n)])
    y = rng.normal(0, 1, (n, 1)) + rng.normal(0, 2, pool)[window] + rng.normal(0, 1, (n, m))
    return y, window


@pytest.mark.parametrize("seed", range(4))
def test_the_error_is_the_two_way_clustered_one_of_statsmodels_on_balanced_data(seed: int) -> None:
    y, window = crossed(seed)
    groups = np.column_stack([np.repeat(np.arange(len(y)), y.shape[1]), window.ravel()])
    fit = sm.OLS(y.ravel(), np.ones(y.size)).fit(cov_type="cluster", cov_kwds={"groups": groups})
    estimate = macro_mean(mean_scores(y, window))
    assert estimate.mean == pytest.approx(float(fit.params[0]))
    assert estimate.se == pytest.approx(float(fit.bse[0]), rel=1e-10)


def test_unbalanced_shares_give_the_brute_force_double_sum() -> None:
    rng = np.random.default_rng(4)
    feature, window, u = rng.integers(0, 7, 90), rng.integers(-3, 11, 90), rng.normal(size=90)
    window[:40] = 5

    def summed(same: np.ndarray, n: int) -> float:
        return float(sum(u[i] * u[j] for i in range(90) for j in range(90) if same[i, j]) * n / (n - 1))

    same_feature, same_window = np.equal.outer(feature, feature), np.equal.outer(window, window)
    pairs = len(set(zip(feature.tolist(), window.tolist(), strict=True)))
    by_feature = summed(same_feature, len(set(feature.tolist())))
    by_window = summed(same_window, len(set(window.tolist())))
    expected = max(by_feature, by_feature + by_window - summed(same_feature & same_window, pairs))
    assert two_way_variance(u, feature, window) == pytest.approx(expected, rel=1e-10)
    huge = window.astype(np.int64) * 2**57 + 2**60
    assert two_way_variance(u, feature, huge) == pytest.approx(expected, rel=1e-10)


def test_features_that_share_no_window_have_the_textbook_error() -> None:
    y, _ = crossed(7)
    estimate = macro_mean(mean_scores(y, np.arange(y.size).reshape(y.shape)))
    values = y.mean(1)
    assert estimate.se >= values.std(ddof=1) / math.sqrt(len(values)) - 1e-12
    assert estimate.se == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), rel=0.02)
    low, high = scipy_stats.t.interval(0.95, len(values) - 1, values.mean(), estimate.se)
    assert (estimate.low, estimate.high) == pytest.approx((low, high))


def test_the_error_is_never_below_that_of_features_alone() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        y = rng.normal(size=(6, 5))
        y[:3] *= -1  # windows that push features apart make V_window − V_both negative
        window = np.tile(np.arange(5), (6, 1))
        assert macro_mean(mean_scores(y, window)).se >= y.mean(1).std(ddof=1) / math.sqrt(6) - 1e-12


def test_below_two_features_there_is_no_error() -> None:
    one = macro_mean(mean_scores(np.array([[0.0, 1.0]]), np.array([[0, 1]])))
    assert (one.n, one.mean) == (1, 0.5)
    assert math.isnan(one.se) and math.isnan(one.low) and math.isnan(one.high) and math.isnan(one.z)
    none = macro_mean(mean_scores(np.zeros((0, 3)), np.zeros((0, 3), int)))
    assert none.n == 0 and math.isnan(none.mean) and math.isnan(none.se)


def test_z_of_a_certain_difference_is_infinite_and_of_none_is_missing() -> None:
    ones, halves = (mean_scores(np.full((3, 4), value), np.arange(12).reshape(3, 4)) for value in (1.0, 0.5))
    assert paired_difference(ones, halves).z == math.inf
    assert paired_difference(halves, ones).z == -math.inf
    assert math.isnan(paired_difference(ones, ones).z)


def test_a_paired_difference_is_the_mean_of_the_differences() -> None:
    first, window = crossed(1)
    second = first + np.random.default_rng(2).normal(0.3, 1, first.shape)
    shared = paired_difference(mean_scores(first, window), mean_scores(second, window))
    direct = macro_mean(mean_scores(first - second, window))
    assert (shared.n, shared.mean) == (direct.n, pytest.approx(direct.mean))
    assert shared.se == pytest.approx(direct.se, rel=1e-10)


def test_pairing_keeps_the_features_that_both_have() -> None:
    first, window = crossed(1)
    a, b = mean_scores(first, window), mean_scores(first[3:] - 1, window[3:])
    renamed = Scores(a.features[3:], b.values, b.feature, b.window, b.influence, 0, 0)
    estimate = paired_difference(a, renamed)
    assert (estimate.n, estimate.mean, estimate.se) == (9, pytest.approx(1.0), pytest.approx(0, abs=1e-9))
    assert paired_difference(a, mean_scores(first, window, "other")).n == 0


def test_an_unpaired_difference_is_the_test_of_welch() -> None:
    rng = np.random.default_rng(9)
    first, second = rng.normal(0, 1, (15, 1)), rng.normal(0.4, 2, (40, 1))
    a, b = (mean_scores(y, np.arange(y.size).reshape(y.shape) + start) for y, start in ((first, 0), (second, 1000)))
    estimate = difference(a, b, paired=False)
    welch = scipy_stats.ttest_ind(first.ravel(), second.ravel(), equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert estimate.z == pytest.approx(welch.statistic)
    assert estimate.df == pytest.approx(welch.df)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))


def simulated(rng: np.random.Generator, n: int = 50, m: int = 20, pool: int = 150) -> tuple[np.ndarray, ...]:
    """A judge with a skill per feature and an effect per window; all negatives come from one pool of windows."""
    skill, effect = rng.normal(0.8, 0.6, n), rng.normal(0, 0.6, pool + n * m)
    negatives = rng.permuted(np.tile(np.arange(pool), (n, 1)), axis=1)[:, :m]
    window = np.hstack([pool + np.arange(n * m).reshape(n, m), negatives]).ravel()
    label = np.tile(np.arange(2 * m) < m, n)
    feature = np.repeat(np.arange(n), 2 * m)
    confidence = rng.normal(size=2 * n * m) + effect[window] + np.where(label, skill[feature], 0)
    return feature, window, label, (confidence > 0.4).astype(float), confidence


def truth(metric: str) -> float:
    """The expected score of the simulated judge, in closed form."""
    phi = scipy_stats.norm.cdf
    noise = 1 + 0.6**2
    if metric == "auroc":
        return float(phi(0.8 / math.sqrt(2 * noise + 0.6**2)))
    return float((phi(0.4 / math.sqrt(noise + 0.6**2)) + phi(0.4 / math.sqrt(noise))) / 2)


@pytest.mark.parametrize("metric", ["auroc", "balanced_accuracy"])
def test_the_95_percent_interval_covers_the_truth_of_simulated_judges(metric: str) -> None:
    rng = np.random.default_rng(20)
    tables = 1500
    covered = feature_only = 0
    for _ in range(tables):
        scores = score_features(metric, *simulated(rng))
        estimate = macro_mean(scores)
        covered += estimate.low <= truth(metric) <= estimate.high
        alone = scipy_stats.t.ppf(0.975, 49) * scores.values.std(ddof=1) / math.sqrt(50)
        feature_only += abs(estimate.mean - truth(metric)) <= alone
    assert 0.935 <= covered / tables <= 0.965
    assert feature_only / tables < covered / tables - 0.015  # what an error over features alone would have covered


def test_z_of_two_judges_alike_is_beyond_its_bound_as_often_as_it_should() -> None:
    rng = np.random.default_rng(21)
    beyond, tables = 0, 800
    for _ in range(tables):
        feature, window, label, match, first = simulated(rng, n=30)
        noise = rng.normal(0, 1, (2, len(first)))
        effect = rng.normal(0, 0.6, (2, window.max() + 1))[:, window]  # each judge finds other windows hard
        a, b = (score_features("auroc", feature, window, label, match, first + e) for e in noise + effect)
        beyond += abs(paired_difference(a, b).z) > scipy_stats.t.ppf(0.975, 29)
    assert 0.03 <= beyond / tables <= 0.07


def test_row_order_changes_nothing() -> None:
    y, window = crossed(3)
    order = np.random.default_rng(0).permutation(y.size)
    plain = mean_scores(y, window)
    rows = plain.feature[order], plain.window[order], plain.influence[order]
    assert macro_mean(Scores(plain.features, plain.values, *rows, 0, 0)).se == pytest.approx(macro_mean(plain).se)
