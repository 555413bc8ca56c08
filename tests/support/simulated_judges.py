"""Judges of known accuracy, with effects of features and of windows: what standard errors are held to."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats as scipy_stats

from evalkit.stats.metrics import score_features
from evalkit.stats.standard_errors import macro_mean

ACCURACIES = (0.5, 0.65, 0.8, 0.9, 0.95)
SCENES = (  # windows that positives, and negatives, are drawn from; the sizes of features' and windows' effects
    {"pool": 100, "feature_effect": 0.6, "window_effect": 0.6},
    {"pool": 400, "feature_effect": 0.6, "window_effect": 1.2},
    {"pool": 400, "feature_effect": 0.3, "window_effect": 0.0},
    {"pool": 2000, "feature_effect": 0.9, "window_effect": 0.6},
)
Table = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def judged(
    rng: np.random.Generator,
    accuracy: float,
    *,
    pool: int,
    feature_effect: float,
    window_effect: float,
    n: int = 50,
    m: int = 20,
    windows: np.ndarray | None = None,
) -> Table:
    """A judge that is right with this probability on average over features and windows, and how sure it is.

    Features differ in how well they are judged, windows in how hard they are, and every feature is shown m windows of the
    same two pools. Probit: the sum of both effects and noise is above 0 where the judge is right.
    """
    window = draw_windows(rng, n, m, pool) if windows is None else windows
    label = np.tile(np.arange(2 * m) < m, n)
    feature = np.repeat(np.arange(n), 2 * m)
    scale = math.sqrt(1 + feature_effect**2 + window_effect**2)
    noise = rng.normal(0, feature_effect, n)[feature] + rng.normal(0, window_effect, 2 * pool)[window]
    margin = scipy_stats.norm.ppf(accuracy) * scale + noise + rng.normal(size=len(window))
    return feature, window, label, np.where(margin > 0, label, ~label).astype(float), np.where(label, margin, -margin)


def draw_windows(rng: np.random.Generator, n: int, m: int, pool: int) -> np.ndarray:
    """m positives of the second half of the numbers and m negatives of the first, for every feature."""
    halves = [start + rng.permuted(np.tile(np.arange(pool), (n, 1)), axis=1)[:, :m] for start in (pool, 0)]
    return np.hstack(halves).ravel()


def coverage(seed: int, tables_of_each: int) -> tuple[dict[float, list[bool]], list[bool]]:
    """Whether the 95% interval of each simulated table holds the true accuracy, by accuracy.

    Second: the same for an interval whose error counts features alone, in the scene with the largest window effect.
    """
    rng = np.random.default_rng(seed)
    covered: dict[float, list[bool]] = {accuracy: [] for accuracy in ACCURACIES}
    alone = []
    for scene in SCENES:
        for accuracy in ACCURACIES:
            for _ in range(tables_of_each):
                scores = score_features("balanced_accuracy", *judged(rng, accuracy, **scene))  # type: ignore[arg-type]
                estimate = macro_mean(scores)
                covered[accuracy].append(bool(estimate.low <= accuracy <= estimate.high))
                if scene["window_effect"] > 1:
                    half = scipy_stats.t.ppf(0.975, 49) * scores.values.std(ddof=1) / math.sqrt(50)
                    alone.append(bool(abs(estimate.mean - accuracy) <= half))
    return covered, alone
