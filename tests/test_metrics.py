"""Values against scikit-learn; influences against derivatives of its weighted metrics, the jackknife and DeLong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from evalkit.errors import BadConfig
from evalkit.metrics import METRICS, Scores, score_features

CUTOFF = 0.5


def judged(seed: int, n_features: int = 6, levels: int = 7) -> tuple[np.ndarray, ...]:
    """Random judgements with many ties, of features of different sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(6, 25, n_features)
    feature = np.repeat(np.arange(n_features).astype(str), sizes)
    label = np.concatenate([rng.permutation(np.arange(size) < rng.integers(2, size - 2)) for size in sizes])
    confidence = rng.integers(0, levels, len(label)) / levels + 0.15 * label
    return feature, np.arange(len(label)), label, (confidence > CUTOFF).astype(float), confidence


def oracle(metric: str, label: np.ndarray, confidence: np.ndarray, weight: np.ndarray | None = None) -> float:
    match = confidence > CUTOFF
    if metric == "balanced_accuracy":
        return float(sk.balanced_accuracy_score(label, match, sample_weight=weight))
    if metric == "f1":
        return float(sk.f1_score(label, match, sample_weight=weight, zero_division=0))
    if metric == "auroc":
        return float(sk.roc_auc_score(label, confidence, sample_weight=weight))
    return float(sk.average_precision_score(label, confidence, sample_weight=weight))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_scikit_learn_with_ties(metric: str, seed: int) -> None:
    feature, window, label, match, confidence = judged(seed)
    scores = score_features(metric, feature, window, label, match, confidence)
    expected = [oracle(metric, label[feature == f], confidence[feature == f]) for f in scores.features]
    assert scores.values == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_influence_is_the_derivative_in_the_weight_at_fixed_class_totals(metric: str, seed: int) -> None:
    feature, window, label, match, confidence = judged(seed, n_features=2)
    scores = score_features(metric, feature, window, label, match, confidence)
    step = 1e-5
    for row in range(len(label)):
        mine = feature == feature[row]
        values = []
        for change in (step, -step):
            weight = np.ones(len(label))
            weight[row] += change
            same = mine & (label == label[row])
            weight[same] *= same.sum() / weight[same].sum()
            values.append(oracle(metric, label[mine], confidence[mine], weight[mine]))
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


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 12))
def test_influence_sums_to_zero_in_every_class_of_every_feature(metric: str, seed: int, levels: int) -> None:
    feature, window, label, match, confidence = judged(seed, levels=levels)
    scores = score_features(metric, feature, window, label, match, confidence)
    cell = scores.feature * 2 + label
    assert np.bincount(cell, scores.influence) == pytest.approx(0, abs=1e-12)
    assert ((scores.values >= 0) & (scores.values <= 1 + 1e-12)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_row_order_and_other_features_change_nothing(metric: str) -> None:
    columns = judged(2)
    order = np.random.default_rng(0).permutation(len(columns[0]))
    straight = score_features(metric, *columns)
    shuffled = score_features(metric, *(column[order] for column in columns))
    assert (straight.features == shuffled.features).all()
    assert shuffled.values == pytest.approx(straight.values, abs=1e-13)
    assert shuffled.influence == pytest.approx(straight.influence[order], abs=1e-13)
    alone = columns[0] == "3"
    single = score_features(metric, *(column[alone] for column in columns))
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
        score_features("accuracy", *judged(0))
    assert str(error.value) == (
        "metric: expected one of balanced_accuracy, f1, auroc, auprc; seen 'accuracy'; fix: use 'balanced_accuracy'"
    )
