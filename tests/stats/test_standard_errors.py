"""Standard errors against statsmodels, a brute-force double sum, scipy's t tests, and simulated judges."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as scipy_stats

from evalkit.stats.metrics import Scores, score_features
from evalkit.stats.standard_errors import difference, macro_mean, paired_difference, two_way_variance
from tests.support.simulated_judges import ACCURACIES, SCENES, coverage, draw_windows, judged


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


@pytest.mark.slow
def test_the_95_percent_interval_covers_the_accuracy_of_simulated_judges() -> None:
    """5,000 tables: 250 of every accuracy in every scene. ``make prove-intervals`` draws ten times as many."""
    covered, alone = coverage(seed=20, tables_of_each=250)
    assert sum(map(len, covered.values())) == 5000
    assert 0.94 <= np.mean([hit for hits in covered.values() for hit in hits]) <= 0.96
    for accuracy, hits in covered.items():
        assert 0.925 <= np.mean(hits) <= 0.97, accuracy
    assert np.mean(alone) < 0.935  # an error over features alone


@pytest.mark.slow
def test_the_interval_of_an_auroc_covers_too() -> None:
    """Its truth: by a table of a million judgements, as the two effects have no closed form here."""
    scene = SCENES[0]
    rng = np.random.default_rng(21)
    label, other = (scipy_stats.norm.ppf(0.8) * math.sqrt(1 + 2 * 0.36) * sign for sign in (1, -1))
    # margins of a positive and a negative of one feature share its effect: c₊ = μ + a + …, c₋ = −(μ + a + …)
    draws = rng.normal(0, 0.6, (2_000_000, 1)) * [1, -1] + rng.normal(0, math.sqrt(1.36), (2_000_000, 2))
    truth = float(np.mean(label + draws[:, 0] > other + draws[:, 1]))
    hits = []
    for _ in range(1500):
        estimate = macro_mean(score_features("auroc", *judged(rng, 0.8, **scene)))  # type: ignore[arg-type]
        hits.append(estimate.low <= truth <= estimate.high)
    assert 0.935 <= np.mean(hits) <= 0.965


@pytest.mark.slow
def test_the_paired_test_of_two_judges_alike_is_wrong_as_often_as_it_says() -> None:
    """5,000 tables: judges of one accuracy on the same windows, each finding other features and windows hard."""
    rng = np.random.default_rng(22)
    beyond = []
    for number in range(5000):
        scene, accuracy = SCENES[number % 4], ACCURACIES[number % 5]
        windows = draw_windows(rng, 30, 20, int(scene["pool"]))
        pair = [judged(rng, accuracy, n=30, windows=windows, **scene) for _ in range(2)]  # type: ignore[arg-type]
        a, b = (score_features("balanced_accuracy", *one) for one in pair)
        difference = paired_difference(a, b)
        beyond.append(abs(difference.z) > scipy_stats.t.ppf(0.975, difference.df))
    assert 0.04 <= np.mean(beyond) <= 0.06


@pytest.mark.slow
def test_an_uninformative_judge_scores_a_half() -> None:
    """Whatever share of the windows it says yes to, and however it ranks them."""
    rng = np.random.default_rng(23)
    found = {"balanced_accuracy": [], "auroc": []}
    for number in range(1000):
        feature, window, label, _, _ = judged(rng, 0.5, **SCENES[number % 4])  # type: ignore[arg-type]
        confidence = rng.normal(size=len(window)) + 0.8 * rng.normal(size=window.max() + 1)[window]
        match = (confidence > rng.normal()).astype(float)
        for metric, values in found.items():
            values.append(macro_mean(score_features(metric, feature, window, label, match, confidence)).mean)
    for metric, values in found.items():
        assert np.mean(values) == pytest.approx(0.5, abs=0.005), metric


def test_intervals_of_bounded_scores_stay_inside() -> None:
    window = np.arange(40).reshape(4, 10)
    y = np.ones((4, 10))
    y[0, 0] = 0
    near = replace(mean_scores(y, window), bounds=(0.0, 1.0))
    estimate = macro_mean(near)
    assert 0 < estimate.low < estimate.mean < estimate.high < 1
    assert estimate.mean - estimate.low > estimate.high - estimate.mean
    plain = macro_mean(mean_scores(y, window))
    assert plain.high > 1 and plain.se == estimate.se
    sure = macro_mean(replace(mean_scores(np.ones((4, 10)), window), bounds=(0.0, 1.0)))
    assert (sure.low, sure.mean, sure.high, sure.se) == (1, 1, 1, 0)
    r = macro_mean(replace(mean_scores(y - 0.5, window), bounds=(-1.0, 1.0)))  # Fisher's z
    half = scipy_stats.t.ppf(0.975, 3) * r.se / (1 - r.mean**2)
    assert (r.low, r.high) == pytest.approx((np.tanh(np.arctanh(r.mean) - half), np.tanh(np.arctanh(r.mean) + half)))


def test_row_order_changes_nothing() -> None:
    y, window = crossed(3)
    order = np.random.default_rng(0).permutation(y.size)
    plain = mean_scores(y, window)
    rows = plain.feature[order], plain.window[order], plain.influence[order]
    assert macro_mean(Scores(plain.features, plain.values, *rows, 0, 0)).se == pytest.approx(macro_mean(plain).se)
