"""Standard errors against the textbook and a literal sum over clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evalkit.fit.estimates import over_features, over_tokens


def test_over_features_is_the_textbook_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=40)
    found = over_features(np.append(values, np.nan))
    assert found.n == 40
    assert found.mean == pytest.approx(values.mean())
    assert found.se == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    assert math.isnan(over_features(np.array([np.nan])).mean) and over_features(np.array([1.0])).n == 1
    assert math.isnan(over_features(np.array([1.0])).se)


def test_over_tokens_clusters_by_document() -> None:
    generator = np.random.default_rng(1)
    documents = generator.integers(0, 12, 500) * 7
    values = generator.normal(size=500) + generator.normal(size=100)[documents]
    mean, se = over_tokens(values, documents)
    sums = [float((values[documents == document] - values.mean()).sum()) for document in np.unique(documents)]
    expected = math.sqrt(len(sums) / (len(sums) - 1) * sum(value**2 for value in sums)) / 500
    assert mean == pytest.approx(values.mean())
    assert se == pytest.approx(expected)
    assert se > 2 * values.std() / math.sqrt(500)  # tokens of one document go together
    alone = over_tokens(values, np.arange(500))[1]
    assert alone == pytest.approx(values.std(ddof=1) / math.sqrt(500))


def test_one_document_has_no_standard_error() -> None:
    mean, se = over_tokens(np.array([1.0, 3.0]), np.array([4, 4]))
    assert mean == 2 and math.isnan(se)
    assert all(math.isnan(value) for value in over_tokens(np.empty(0), np.empty(0, np.int64)))
