"""Values against scikit-learn; influences against derivatives of its weighted metrics, the jackknife and DeLong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from evalkit.errors import BadConfig
from evalkit.stats.metrics import BASE_RATE_METRICS, METRICS, Scores, score_features
from evalkit.stats.standard_errors import macro_mean, two_way_variance

CUTOFF = 0.5


def judged(seed: int, n_features: int = 6, levels: int = 7) -> tuple[np.ndarray, ...]:
    """Random judgements with many ties, of features of different sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(6, 25, n_features)
    feature = np.repeat(np.arange(n_features).astype(str), sizes)
    label = np.concatenate([rng.permutation(np.arange(size) < rng.integers(2, size - 2)) for size in sizes])
    confidence = rng.integers(0, levels, len(label)) / levels + 0.15 * label
    return feature, np.arange(len(label)), label, (confidence > CUTOFF).astype(float), confidence


def rates(feature: np.ndarray) -> np.ndarray:
    """A base rate for every feature, small and large ones."""
    return np.array([0.02, 0.1, 0.3, 0.6, 0.9, 0.5])[feature.astype(int) % 6]


def score(metric: str, *columns: np.ndarray) -> Scores:
    return score_features(metric, *columns, base_rate=rates(columns[0]))


def oracle(
    metric: str, label: np.ndarray, confidence: np.ndarray, weight: np.ndarray | None = None, rate: float = 0.5
) -> float:
    match = confidence > CUTOFF
    if metric.endswith("_base_rate"):
        metric = metric.removesuffix("_base_rate")
        weight = np.ones(len(label)) if weight is None else weight
        weight = weight * np.where(label, rate / weight[label].sum(), (1 - rate) / weight[~label].sum())
    if metric == "accuracy":
        return float(sk.accuracy_score(label, match, sample_weight=weight))
    if metric == "balanced_accuracy":
        return float(sk.balanced_accuracy_score(label, match, sample_weight=weight))
    if metric == "f1":
        return float(sk.f1_score(label, match, sample_weight=weight, zero_division=0))
    if metric == "auroc":
        return float(sk.roc_auc_score(label, confidence, sample_weight=weight))
    return float(sk.average_precision_score(label, confidence, sample_weight=weight))


EVERY = (*METRICS, *BASE_RATE_METRICS, "accuracy")


@pytest.mark.parametrize("metric", EVERY)
@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_scikit_learn_with_ties(metric: str, seed: int) -> None:
    feature, window, label, match, confidence = judged(seed)
    scores = score(metric, feature, window, label, match, confidence)
    expected = [
        oracle(metric, label[feature == f], confidence[feature == f], rate=rates(np.array([f]))[0])
        for f in scores.features
    ]
    assert scores.values == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", (*METRICS, *BASE_RATE_METRICS))
@pytest.mark.parametrize("seed", range(3))
def test_influence_is_the_derivative_in_the_weight_at_fixed_class_totals(metric: str, seed: int) -> None:
    feature, window, label, match, confidence = judged(seed, n_features=2)
    scores = score(metric, feature, window, label, match, confidence)
    step = 1e-5
    for row in range(len(label)):
        mine = feature == feature[row]
        values = []
        for change in (step, -step):
            weight = np.ones(len(label))
            weight[row] += change
            same = mine & (label == label[row])
            weight[same] *= same.sum() / weight[same].sum()
            rate = rates(feature[row : row + 1])[0]
            values.append(oracle(metric, label[mine], confidence[mine], weight[mine], rate))
        assert scores.influence[row] == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("metric", ["balanced_accuracy", "auroc"])
def test_influence_is_the_exact_jackknife_where_the_metric_is_linear_in_each_class(metric: str) -> None:
    feature, window, label, match, confidence = judged(11, n_features=1)
    scores = score_features(metric, feature, window, label, match, confidence)
    for row in range(len(label)):
        rest = np.arange(len(label)) != row
        without = oracle(metric, label[rest], confidence[rest])
        n = int((label == label[row]).sum())
        assert scores.influence[row] == pytest.approx((scores.values[0] - without) * (n - 1) / n, abs=1e-12)


@pytest.mark.parametrize("metric", ["f1", "auprc"])
def test_influence_is_near_the_jackknife_where_the_metric_is_not_linear(metric: str) -> None:
    rng = np.random.default_rng(3)
    label = np.arange(400) < 200
    confidence = rng.normal(size=400) + 0.8 * label
    match = (confidence > CUTOFF).astype(float)
    scores = score_features(metric, np.zeros(400, int), np.arange(400), label, match, confidence)
    jackknife = np.empty(400)
    for row in range(400):  # leave one out, the rest of its class taking over its weight
        weight = np.where(label == label[row], 200 / 199, 1.0)
        weight[row] = 0
        jackknife[row] = (scores.values[0] - oracle(metric, label, confidence, weight)) * 199 / 200
    assert np.corrcoef(jackknife, scores.influence)[0, 1] > 0.999
    assert np.sum(scores.influence**2) == pytest.approx(np.sum(jackknife**2), rel=0.05)


def test_auroc_variance_is_that_of_delong() -> None:
    feature, window, label, match, confidence = judged(5, n_features=1)
    scores = score_features("auroc", feature, window, label, match, confidence)
    kernel = np.heaviside(np.subtract.outer(confidence[label], confidence[~label]), 0.5)
    m, n = kernel.shape
    delong = kernel.mean(1).var(ddof=1) / m + kernel.mean(0).var(ddof=1) / n
    mine = np.sum(scores.influence[label] ** 2) * m / (m - 1) + np.sum(scores.influence[~label] ** 2) * n / (n - 1)
    assert mine == pytest.approx(delong, rel=1e-12)


@pytest.mark.parametrize("metric", (*METRICS, *BASE_RATE_METRICS))
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 12))
def test_influence_sums_to_zero_in_every_class_of_every_feature(metric: str, seed: int, levels: int) -> None:
    feature, window, label, match, confidence = judged(seed, levels=levels)
    scores = score(metric, feature, window, label, match, confidence)
    cell = scores.feature * 2 + label
    assert np.bincount(cell, scores.influence) == pytest.approx(0, abs=1e-12)
    assert ((scores.values >= 0) & (scores.values <= 1 + 1e-12)).all()


@pytest.mark.parametrize("metric", EVERY)
def test_row_order_and_other_features_change_nothing(metric: str) -> None:
    columns = judged(2)
    order = np.random.default_rng(0).permutation(len(columns[0]))
    straight = score(metric, *columns)
    shuffled = score(metric, *(column[order] for column in columns))
    assert (straight.features == shuffled.features).all()
    assert shuffled.values == pytest.approx(straight.values, abs=1e-13)
    assert shuffled.influence == pytest.approx(straight.influence[order], abs=1e-13)
    alone = columns[0] == "3"
    single = score(metric, *(column[alone] for column in columns))
    assert single.values == pytest.approx(straight.values[straight.features == "3"], abs=1e-13)


@pytest.mark.parametrize("metric", ["auroc", "auprc"])
def test_ranking_metrics_see_only_the_order(metric: str) -> None:
    feature, window, label, match, confidence = judged(8)
    plain = score_features(metric, feature, window, label, match, confidence)
    bent = score_features(metric, feature, window, label, match, np.exp(5 * confidence))
    assert bent.values == pytest.approx(plain.values, abs=0)


def unscored(metric: str) -> Scores:
    """One whole feature; one whose only negative lacks what the metric needs; one without any answer."""
    feature = np.array(["a"] * 4 + ["b"] * 2 + ["c"] * 2)
    label = np.array([1, 1, 0, 0, 1, 0, 1, 0], bool)
    nan = np.nan
    match = np.array([1, nan, 0, 1, 1, nan, nan, nan])
    confidence = np.array([0.9, nan, 0.1, 0.8, 0.7, nan, nan, nan])
    return score_features(metric, feature, np.arange(8), label, match, confidence)


@pytest.mark.parametrize(
    ("metric", "value"), [("balanced_accuracy", 0.75), ("f1", 2 / 3), ("auroc", 1.0), ("auprc", 1.0)]
)
def test_unscored_judgements_are_left_out_and_counted(metric: str, value: float) -> None:
    scores = unscored(metric)
    assert scores.features.tolist() == ["a"]
    assert scores.values == pytest.approx([value])
    assert (scores.n_unscored, scores.n_one_class, len(scores.influence)) == (4, 2, 3)


def test_a_match_without_confidence_counts_for_decisions_only() -> None:
    columns = (np.zeros(4, int), np.arange(4), np.array([1, 1, 0, 0], bool), np.array([1.0, 1, 0, 0]))
    nothing = np.full(4, np.nan)
    assert score_features("balanced_accuracy", *columns, nothing).values == pytest.approx([1.0])
    ranked = score_features("auroc", *columns, nothing)
    assert (len(ranked.values), ranked.n_unscored) == (0, 4)


@pytest.mark.parametrize("metric", METRICS)
def test_no_judgements_give_no_scores(metric: str) -> None:
    empty = np.zeros(0)
    scores = score_features(metric, empty.astype(str), empty.astype(int), empty.astype(bool), empty, empty)
    assert len(scores.values) == len(scores.influence) == scores.n_unscored == 0


def test_infinite_confidences_tie_with_each_other() -> None:
    confidence = np.array([np.inf, np.inf, -np.inf, np.inf])
    label = np.array([1, 0, 0, 1], bool)
    scores = score_features("auroc", np.zeros(4, int), np.arange(4), label, confidence > 0, confidence)
    assert scores.values == pytest.approx([0.75])


def test_an_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(BadConfig) as error:
        score_features("precision", *judged(0))
    assert str(error.value) == (
        "metric: expected one of balanced_accuracy, f1, auroc, auprc, f1_base_rate, auprc_base_rate, accuracy, pearson; "
        "seen 'precision'; fix: use 'balanced_accuracy'"
    )


def test_accuracy_needs_one_class_only() -> None:
    feature, match = np.array(["a", "a", "a", "b"]), np.array([1.0, 0, np.nan, 1])
    nothing = np.full(4, np.nan)
    scores = score_features("accuracy", feature, np.arange(4), np.ones(4, bool), match, nothing)
    assert scores.features.tolist() == ["a", "b"] and scores.values == pytest.approx([0.5, 1.0])
    assert (scores.n_unscored, scores.n_one_class) == (1, 0)
    assert scores.influence == pytest.approx([0.25, -0.25, 0.0])


def test_a_feature_of_unknown_base_rate_has_no_score_that_needs_one() -> None:
    columns = judged(2)
    unknown = np.where(columns[0] == "3", np.nan, 0.1)
    scores = score_features("f1_base_rate", *columns, base_rate=unknown)
    assert "3" not in scores.features and len(scores.features) == 5 and scores.n_one_class == 1
    assert len(score_features("f1_base_rate", *columns).features) == 0


def simulated_windows(seed: int, constant: bool = False) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Features (window,), and the predictions and activations on the tokens of each window."""
    rng = np.random.default_rng(seed)
    feature = np.repeat(np.array(["a", "b", "c"]), [5, 9, 7])
    true = [np.maximum(rng.normal(size=rng.integers(4, 30)), 0) * 1000 for _ in feature]
    made = [np.full(len(y), 3.0) if constant else 0.01 * y + rng.normal(size=len(y)) + 50 for y in true]
    return feature, made, true


def moments(made: list[np.ndarray], true: list[np.ndarray]) -> np.ndarray:
    pairs = zip(made, true, strict=True)
    return np.array([[len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y] for x, y in pairs])


def pearson(feature: np.ndarray, made: list[np.ndarray], true: list[np.ndarray]) -> Scores:
    nothing = np.full(len(feature), np.nan)
    label = np.array([bool(y.any()) for y in true])
    return score_features(
        "pearson", feature, np.arange(len(feature)), label, nothing, nothing, moments=moments(made, true)
    )


@pytest.mark.parametrize("seed", range(3))
def test_pearson_is_the_correlation_over_all_tokens(seed: int) -> None:
    feature, made, true = simulated_windows(seed)
    scores = pearson(feature, made, true)
    for name, value in zip(scores.features, scores.values, strict=True):
        mine = np.flatnonzero(feature == name)
        x, y = (np.concatenate([side[i] for i in mine]) for side in (made, true))
        assert value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)


def test_the_influence_on_pearson_is_the_derivative_in_the_weight_of_a_window() -> None:
    feature, made, true = simulated_windows(4)
    scores, step = pearson(feature, made, true), 1e-6
    for name in ("a", "b", "c"):
        mine = np.flatnonzero(feature == name)
        x, y = (np.concatenate([side[i] for i in mine]) for side in (made, true))
        owner = np.repeat(mine, [len(true[i]) for i in mine])
        for row in mine:
            up, down = (_weighted_correlation(x, y, 1 + change * (owner == row)) for change in (step, -step))
            assert scores.influence[row] == pytest.approx((up - down) / (2 * step), abs=1e-7)
        assert scores.influence[mine].sum() == pytest.approx(0, abs=1e-9)


def _weighted_correlation(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    covariance = np.cov(x, y, aweights=weight, ddof=0)
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


def test_a_constant_prediction_correlates_with_nothing() -> None:
    scores = pearson(*simulated_windows(5, constant=True))
    assert scores.values.tolist() == [0, 0, 0] and not scores.influence.any()


def test_windows_without_a_prediction_are_unscored() -> None:
    feature, made, true = simulated_windows(6)
    told = moments(made, true)
    told[3] = np.nan
    nothing = np.full(len(feature), np.nan)
    scores = score_features(
        "pearson", feature, np.arange(len(feature)), np.ones(len(feature), bool), nothing, nothing, moments=told
    )
    kept = [i for i in range(5) if i != 3]
    expected = np.corrcoef(np.concatenate([made[i] for i in kept]), np.concatenate([true[i] for i in kept]))[0, 1]
    assert scores.n_unscored == 1 and scores.values[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", EVERY[:4])
def test_pooled_features_share_the_score_of_all_judgements_and_its_error(metric: str) -> None:
    feature, window, label, match, confidence = judged(9)
    scores = score_features(metric, feature, window, label, match, confidence, pooled=True)
    assert scores.values == pytest.approx(oracle(metric, label, confidence)) and len(scores.values) == 6
    one = score_features(metric, np.zeros(len(feature), int), window, label, match, confidence)
    n = len(feature)
    clustered = sum(one.influence[feature == f].sum() ** 2 for f in scores.features) * 6 / 5
    assert macro_mean(scores).mean == pytest.approx(one.values[0])
    assert two_way_variance(scores.influence / 6, scores.feature, window) == pytest.approx(clustered, rel=1e-9)
    assert macro_mean(scores).se == pytest.approx(np.sqrt(clustered), rel=1e-9) and n > 6
    nobody = score_features(metric, feature, window, np.ones(n, bool), match, confidence, pooled=True)
    assert (len(nobody.values), nobody.n_one_class) == (0, 6)


@pytest.mark.parametrize("metric", ["f1_base_rate", "auprc_base_rate"])
def test_pooled_base_rates_are_those_of_all_features_in_any_order(metric: str) -> None:
    feature, window, label, match, confidence = judged(9)
    number = np.unique(feature, return_inverse=True)[1]
    rate = np.linspace(0.01, 0.4, 6)[number]
    rate[number == 0] = np.nan  # of one it is unknown
    columns = (feature, window, label, match, confidence, rate)
    ways = [tuple(column[order] for column in columns) for order in (slice(None), slice(None, None, -1))]
    one, other = (score_features(metric, *way[:5], base_rate=way[5], pooled=True).values for way in ways)
    mean = np.full(len(rate), np.nanmean(rate))
    by_hand = score_features(metric, np.zeros(len(rate), int), *columns[1:5], base_rate=mean).values
    assert one == pytest.approx(other) and one[0] == pytest.approx(by_hand[0])


def test_where_everything_is_positive_a_confident_negative_weighs_nothing() -> None:
    label, confidence = np.array([True, True, False]), np.array([0.2, 0.4, 0.9])
    scores = score_features(
        "auprc_base_rate", np.zeros(3, int), np.arange(3), label, confidence > 0.5, confidence, base_rate=np.ones(3)
    )
    assert scores.values[0] == pytest.approx(1.0) and np.isfinite(scores.influence).all()


def test_the_error_of_an_accuracy_is_that_of_a_test_with_so_many_of_each_class() -> None:
    """40 right of 50 positives, 10 of 50 negatives: the classes were not drawn, so their difference is no error."""
    label = np.repeat([True, False], 50)
    match = np.concatenate([np.repeat([1.0, 0.0], [40, 10]), np.repeat([1.0, 0.0], [40, 10])])
    scores = score_features("accuracy", np.zeros(100, int), np.arange(100), label, match, match)
    assert scores.values[0] == pytest.approx(0.5)
    assert (scores.influence**2).sum() == pytest.approx(2 * 50 * 0.8 * 0.2 / 100**2)
