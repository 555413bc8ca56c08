"""The split of variance against simulations of known components; sample sizes against statsmodels and a simulation."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.power import NormalIndPower

from evalkit.stats.metrics import Scores, score_features
from evalkit.stats.variance import features_needed, spread_of


def means(y: np.ndarray) -> Scores:
    """The mean of two classes' means of y (feature, window, repeat) as a metric; every feature has its own windows."""
    n, w, r = y.shape
    halves = np.repeat(y.reshape(n, 2, w // 2, r).mean((2, 3)), w // 2, axis=1)[:, :, None]
    return Scores(
        features=np.arange(n).astype(str),
        values=y.mean((1, 2)),
        feature=np.repeat(np.arange(n), w * r),
        window=np.repeat(np.arange(n * w), r),
        influence=((y - halves) / (w * r)).ravel(),
        n_unscored=0,
        n_one_class=0,
    )


def simulated(rng: np.random.Generator, n: int, w: int, r: int, sd: tuple[float, float, float]) -> np.ndarray:
    features, examples, judge = sd
    made = rng.normal(0, features, (n, 1, 1)) + rng.normal(0, examples, (n, w, 1)) + rng.normal(0, judge, (n, w, r))
    return np.asarray(made)


@pytest.mark.parametrize("sd", [(0.5, 1.0, 1.0), (1.0, 0.3, 2.0), (0.2, 2.0, 0.5)])
def test_components_are_those_of_the_simulation(sd: tuple[float, float, float]) -> None:
    rng, w, r = np.random.default_rng(1), 30, 3
    found = [spread_of(means(simulated(rng, 40, w, r, sd))) for _ in range(150)]
    spreads = [one for one in found if one is not None]
    judge = np.mean([one.judge for one in spreads if one.judge is not None])
    assert judge == pytest.approx(sd[2] ** 2 / (w * r), rel=0.05)
    assert np.mean([one.examples for one in spreads]) == pytest.approx(sd[1] ** 2 / w, rel=0.08)
    assert np.mean([one.features for one in spreads]) == pytest.approx(sd[0] ** 2, rel=0.1)
    assert {one.repeats for one in spreads} == {3.0}


def test_two_classes_lose_two_degrees_of_freedom() -> None:
    """Of a judge whose features are all alike, all variance is that of examples."""
    rng = np.random.default_rng(2)
    examples, between = [], []
    for _ in range(300):
        label = np.tile(np.arange(24) < 12, 50)
        confidence = rng.normal(size=1200) + label
        feature = np.repeat(np.arange(50), 24)
        match = (confidence > 0.5).astype(float)
        scores = score_features("balanced_accuracy", feature, np.arange(1200), label, match, confidence)
        spread = spread_of(scores)
        assert spread is not None and spread.judge is None
        examples.append(spread.examples)
        between.append(scores.values.var(ddof=1))
    assert np.mean(examples) == pytest.approx(np.mean(between), rel=0.03)


def test_repeats_that_agree_have_no_judge_noise() -> None:
    y = np.repeat(simulated(np.random.default_rng(3), 20, 10, 1, (1, 1, 0)), 4, axis=2)
    spread = spread_of(means(y))
    assert spread is not None and spread.judge == pytest.approx(0, abs=1e-12) and spread.total > 0
    assert spread_of(means(y[:1])) is None


@pytest.mark.parametrize(("sd", "apart"), [(0.1, 0.02), (0.15, 0.05), (0.08, 0.02)])
def test_the_needed_sample_is_that_of_the_normal_test(sd: float, apart: float) -> None:
    expected = NormalIndPower().solve_power(apart / sd, alpha=0.05, power=0.8, ratio=1, alternative="two-sided")
    assert features_needed(sd**2, apart) == pytest.approx(np.ceil(expected), abs=1)


def test_so_many_features_do_tell_them_apart_four_times_in_five() -> None:
    rng = np.random.default_rng(4)
    n = features_needed(0.1**2, 0.05)
    first, second = rng.normal(0.75, 0.1, (4000, n)), rng.normal(0.70, 0.1, (4000, n))
    z = (first.mean(1) - second.mean(1)) / np.sqrt((first.var(1, ddof=1) + second.var(1, ddof=1)) / n)
    assert np.mean(z > 1.96) == pytest.approx(0.8, abs=0.025)
