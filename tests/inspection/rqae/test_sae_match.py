"""Matching latents against scipy's Pearson and literal loops over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from evalkit.inspection.rqae.sae_match import (
    LatentExamples,
    choose_examples,
    match_latents,
    pearson,
    summarise,
)
from evalkit.records import Activations
from rqae import RqaeConfig
from rqae.features import intensity_literal
from tests.support.random_rqae import random_rqae

LENGTH = 10
MODEL = random_rqae(RqaeConfig(16, num_quantizers=12), seed=4)


def corpus(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token numbers with holes (masked tokens), dense activations (token, latent), codes."""
    generator = np.random.default_rng(seed)
    tokens = np.flatnonzero(generator.random(40 * LENGTH) < 0.9)
    values = generator.random((len(tokens), 5)).astype(np.float32)
    values[generator.random(values.shape) < (0.2, 0.8, 0.99, 0.7, 0.5)] = 0
    states = torch.from_numpy(generator.normal(size=(len(tokens), 16))).float()
    return tokens, values, MODEL.encode(states).numpy().astype(np.uint16)


def recorded(tokens: np.ndarray, values: np.ndarray) -> Activations:
    rows, latents = values.nonzero()
    return Activations(tokens[rows], latents, values[rows, latents], len(tokens))


def test_pearson_is_scipys() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 100)).astype(np.float32)
    assert pearson(first, second) == pytest.approx(pearsonr(first, second).statistic, abs=1e-6)
    assert pearson(first, 3 * first - 1) == pytest.approx(1)
    for constant in (np.full(100, 0.1), np.zeros(100)):
        assert math.isnan(pearson(first, constant))
    assert math.isnan(pearson(first[:1], second[:1]))


def test_examples_are_the_top_and_the_middle_of_the_contexts() -> None:
    tokens, values, _ = corpus()
    found = choose_examples(recorded(tokens, values), LENGTH, range(5), 5, 4)
    assert [one.latent for one in found] == [0, 1, 3, 4]  # the third fires in too few contexts
    for one in found:
        fires = values[:, one.latent]
        peaks = {
            context: fires[tokens // LENGTH == context].max()
            for context in np.unique(tokens // LENGTH)
            if fires[tokens // LENGTH == context].any()
        }
        ranked = sorted(peaks, key=lambda context: (-peaks[context], context))
        assert one.contexts["top"].tolist() == sorted(ranked[:4])
        middle = (len(ranked) - 4) // 2
        assert one.contexts["median"].tolist() == sorted(ranked[middle : middle + 4])
        assert not set(one.contexts["top"]) & set(one.contexts["median"])
        assert one.best == tokens[fires.argmax()]
    assert [one.latent for one in choose_examples(recorded(tokens, values), LENGTH, range(5), 2, 4)] == [0, 1]


def test_correlations_are_those_of_loops_over_tokens() -> None:
    tokens, values, codes = corpus()
    examples = choose_examples(recorded(tokens, values), LENGTH, range(5), 5, 4)
    columns = MODEL.encode(torch.randn(len(examples), 16, generator=torch.Generator().manual_seed(5))).numpy()
    depths = (1, 12, 4)
    found = match_latents(MODEL, codes, tokens, LENGTH, examples, columns, depths)
    assert found.shape == (2, 2, 3, 4)
    whole = torch.from_numpy(codes.astype(np.int64))
    for number, one in enumerate(examples):
        for place, name in enumerate(("top", "median")):
            rows = [row for row, token in enumerate(tokens) if token // LENGTH in one.contexts[name]]
            best = tokens.tolist().index(one.best)
            for step, depth in enumerate(depths):
                column = intensity_literal(MODEL, whole[rows], torch.from_numpy(columns[[number]]), depth)[:, 0]
                expected = pearsonr(values[rows, one.latent], column).statistic
                assert found[0, place, step, number] == pytest.approx(expected, abs=1e-5)
                others = [row for row in rows if row != best]
                example = intensity_literal(MODEL, whole[others], whole[[best]], depth)[:, 0]
                expected = pearsonr(values[others, one.latent], example).statistic
                assert found[1, place, step, number] == pytest.approx(expected, abs=1e-5)


def test_a_latent_that_is_an_rqae_feature_matches_it_perfectly() -> None:
    tokens, _, codes = corpus()
    whole = torch.from_numpy(codes.astype(np.int64))
    feature = whole[[30]]
    values = intensity_literal(MODEL, whole, feature, 12).numpy() + 2  # dense: fires everywhere
    examples = choose_examples(recorded(tokens, values), LENGTH, [0], 1, 4)
    assert examples[0].best == tokens[30]
    found = match_latents(MODEL, codes, tokens, LENGTH, examples, feature.numpy(), (12,))
    np.testing.assert_allclose(found, 1, atol=1e-4)


def test_the_table_has_a_line_for_each_mean() -> None:
    values = np.random.default_rng(0).normal(size=(2, 2, 3, 6))
    values[1, 0, 2, 4] = np.nan
    rows = summarise(values, (1, 2, 4))
    assert len(rows) == 12
    row = next(row for row in rows if (row.depth, row.made_from, row.examples) == (4, "top example", "top"))
    known = np.delete(values[1, 0, 2], 4)
    assert row.latents == 5
    assert (row.mean, row.se) == (pytest.approx(known.mean()), pytest.approx(known.std(ddof=1) / np.sqrt(5)))


def test_no_examples_no_correlations() -> None:
    none: list[LatentExamples] = []
    tokens, _, codes = corpus()
    assert match_latents(MODEL, codes, tokens, LENGTH, none, np.empty((0, 12), np.int64), (1,)).shape == (2, 2, 1, 0)
