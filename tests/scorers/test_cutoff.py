"""The fitted cut-off against brute force and hand-made ties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from scorers.cutoff import fit_cutoff


def balanced(confidences: list[float], labels: list[bool], cutoff: float) -> float:
    return float(balanced_accuracy_score(labels, [value > cutoff for value in confidences]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=40))
def test_no_other_midpoint_is_better(pairs: list[tuple[int, bool]]) -> None:
    confidences, labels = [p[0] / 4 for p in pairs], [p[1] for p in pairs]
    cutoff = fit_cutoff(confidences, labels)
    if len(set(labels)) < 2:
        assert cutoff is None
        return
    distinct = sorted(set(confidences))
    midpoints = [(a + b) / 2 for a, b in itertools.pairwise(distinct)] or distinct
    best = max(balanced(confidences, labels, midpoint) for midpoint in midpoints)
    tied = [midpoint for midpoint in midpoints if balanced(confidences, labels, midpoint) == pytest.approx(best)]
    assert cutoff == tied[(len(tied) - 1) // 2]


def test_the_middle_of_a_plateau() -> None:
    # negatives 0 and 1, positives 2 and 3: one perfect cut, half way
    assert fit_cutoff([3.0, 0.0, 2.0, 1.0], [True, False, True, False]) == 1.5
    # - + - + - +: cuts at 0.5, 2.5 and 4.5 are equally good; the middle one
    assert fit_cutoff([0, 1, 2, 3, 4, 5], [False, True, False, True, False, True]) == 2.5


def test_odd_sizes() -> None:
    assert fit_cutoff([], []) is None
    assert fit_cutoff([0.4], [True]) is None
    assert fit_cutoff([0.4, 0.4], [True, False]) == 0.4


def test_neighbouring_floats_still_part_the_classes() -> None:
    low, high = 0.5, float(np.nextafter(0.5, 1))
    cutoff = fit_cutoff([high, low], [True, False])
    assert cutoff is not None and high > cutoff and not low > cutoff
