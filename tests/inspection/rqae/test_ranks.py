"""Rank correlations against scipy, top tokens against a full sort, the whole against loops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from evalkit.errors import CorpusError
from evalkit.inspection.rqae.ranks import rank_agreement, rank_correlations, top_tokens
from rqae import RqaeConfig
from rqae.features import intensity_literal
from tests.support.random_rqae import random_rqae

MODEL = random_rqae(RqaeConfig(16, num_quantizers=20), seed=1)
STATES = torch.randn(400, 16, generator=torch.Generator().manual_seed(2))
CODES = MODEL.encode(STATES).numpy().astype(np.uint16)
CENTRES = np.array([3, 390, 17, 44, 3])
DEPTHS = (1, 5, 20)


def normed(rows: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """States in stretches of 30, as the material gives them."""
    assert (np.diff(rows) > 0).all()
    for start in range(0, len(rows), 30):
        places = np.arange(start, min(start + 30, len(rows)))
        yield places, STATES[rows[places]]


def test_rank_correlations_are_scipys_with_ties() -> None:
    generator = np.random.default_rng(0)
    first = generator.integers(0, 6, (4, 3, 50)).astype(float)
    second = generator.normal(size=(4, 3, 50)).round(1)
    first[1, 1] = 2.0
    found = rank_correlations(first, second)
    for place in np.ndindex(4, 3):
        if place == (1, 1):
            assert np.isnan(found[place])
        else:
            assert found[place] == pytest.approx(spearmanr(first[place], second[place]).statistic)
    assert rank_correlations(np.arange(5.0), np.arange(5.0) ** 3) == pytest.approx(1)
    assert rank_correlations(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)


def test_top_tokens_are_the_most_intense_but_the_centre() -> None:
    rows, values = top_tokens(MODEL, CODES, CENTRES, DEPTHS, 25)
    assert rows.shape == values.shape == (3, 5, 25)
    codes = torch.from_numpy(CODES.astype(np.int64))
    for place, depth in enumerate(DEPTHS):
        every = intensity_literal(MODEL, codes, codes[CENTRES], depth).numpy()
        for feature, centre in enumerate(CENTRES):
            assert centre not in rows[place, feature]
            others = np.delete(every[:, feature], centre)
            np.testing.assert_allclose(values[place, feature], np.sort(others)[::-1][:25], atol=1e-5)
            np.testing.assert_allclose(every[rows[place, feature], feature], values[place, feature], atol=1e-5)


def test_agreement_is_what_loops_give() -> None:
    found, values = rank_agreement(MODEL, CODES, CENTRES, normed, DEPTHS, 40)
    rows, intensities = top_tokens(MODEL, CODES, CENTRES, DEPTHS, 40)
    for place, depth in enumerate(DEPTHS):
        line = []
        for feature, centre in enumerate(CENTRES):
            cosines = [
                torch.nn.functional.cosine_similarity(STATES[row], STATES[centre], dim=0).item()
                for row in rows[place, feature]
            ]
            line.append(spearmanr(intensities[place, feature], cosines).statistic)
        np.testing.assert_allclose(values[place], line, atol=1e-6)
        assert found[place].depth == depth and found[place].tried == 5
        assert found[place].mean == pytest.approx(np.mean(line))
        assert found[place].se == pytest.approx(np.std(line, ddof=1) / np.sqrt(5))
    assert found[2].mean > 0.3  # codes of a random RQAE still say where a state points


def test_features_without_an_order_are_counted_out() -> None:
    codes = np.tile(CODES[:2], (60, 1))
    codes[1::2, 0] = codes[0, 0]
    states = STATES[:120]

    def of(rows: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        yield np.arange(len(rows)), states[rows]

    found, values = rank_agreement(MODEL, codes, np.array([0, 1]), of, (1, 20), 100)
    assert (found[0].features, found[0].tried) == (0, 2) and np.isnan(found[0].mean)
    assert found[1].features == 2 and np.isnan(values[0]).all()


def test_fewer_tokens_than_asked() -> None:
    rows, _ = top_tokens(MODEL, CODES[:10], np.array([4]), (20,), 128)
    assert sorted(rows[0, 0].tolist()) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    with pytest.raises(CorpusError, match="at least three tokens; seen 2"):
        top_tokens(MODEL, CODES[:2], np.array([0]), (1,), 5)
