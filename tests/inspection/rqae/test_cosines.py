"""Cosines of decoded codes against the vectors themselves, pair by pair."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from evalkit.errors import BadConfig
from evalkit.inspection.rqae.cosines import BINS, cosine_density, decoded_cosines
from rqae import RQAE, RqaeConfig
from rqae.encoding.codebook import distinct_codes
from tests.support.random_rqae import random_rqae

CONFIGS = {
    "grid": RqaeConfig(6, codebook_dim=2, codebook_size=3, num_quantizers=4),
    "plain grid": RqaeConfig(6, codebook_dim=2, codebook_size=4, num_quantizers=3, quantization_method="fsq"),
    "learned": RqaeConfig(6, codebook_dim=3, codebook_size=7, num_quantizers=3, quantization_method="vq"),
    "one quantizer": RqaeConfig(6, codebook_dim=2, codebook_size=5, num_quantizers=1),
}


def literal(model: RQAE) -> dict[str, np.ndarray]:
    """The cosine of every pair of different decoded codes, by kind."""
    decoded = []
    usable = [code for code in sorted(set(model.canonical.tolist())) if bool(model.codebook[:, code].any())]
    for layer in range(model.config.num_quantizers):
        for code in usable:
            decoded.append((layer, (model.w_out[layer].double() @ model.codebook[layer, code].double()).numpy()))
    found: dict[str, list[float]] = {"within a quantizer": [], "across quantizers": []}
    for (i, left), (j, right) in combinations(decoded, 2):
        kind = "within a quantizer" if i == j else "across quantizers"
        found[kind].append(float(left @ right / np.linalg.norm(left) / np.linalg.norm(right)))
    return {kind: np.array(values) for kind, values in found.items() if values}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_pairs_are_those_of_the_vectors(name: str) -> None:
    model = random_rqae(CONFIGS[name])
    rows, histograms = decoded_cosines(model, 10**6, seed=0)
    by_kind, expected = {row.kind: row for row in rows}, literal(model)
    assert set(histograms) == set(expected)
    for kind, cosines in expected.items():
        row = by_kind[kind]
        assert row.pairs == row.sampled == len(cosines)
        near = np.abs(np.abs(cosines) - 0.2) < 1e-6
        assert row.small == pytest.approx((np.abs(cosines) < 0.2).mean(), abs=near.mean() + 1e-12)
        assert row.mean == pytest.approx(np.abs(cosines).mean(), abs=1e-6)
        assert sum(histograms[kind]) * 2 / BINS == pytest.approx(1)
        coarse = np.asarray(histograms[kind]).reshape(4, -1).mean(axis=1)
        edges = np.array([-1 - 1e-9, -0.5, 0.0, 0.5, 1 + 1e-9])
        ties = (np.abs(cosines[:, None] - edges) < 1e-6).mean(axis=0)[1:4].sum()
        exact = np.histogram(cosines, edges)[0] / len(cosines)
        np.testing.assert_allclose(coarse / 2, exact, atol=ties + 1e-9)
    whole = np.concatenate(list(expected.values()))
    assert by_kind["all"].pairs == len(whole)
    assert by_kind["all"].mean == pytest.approx(np.abs(whole).mean(), abs=1e-6)


def test_the_published_codebook_has_544_codes_and_so_many_pairs() -> None:
    config = RqaeConfig(16, num_quantizers=3)
    rows, _ = decoded_cosines(random_rqae(config), 1000, seed=0)
    count = distinct_codes(config)
    assert count == 544
    assert [row.pairs for row in rows[:3]] == [
        3 * count * (count - 1) // 2, 3 * count**2, 3 * count * (3 * count - 1) // 2,
    ]  # fmt: skip
    assert [row.sampled for row in rows] == [1000, 1000, 2000, 0]


def test_a_sample_speaks_for_all_pairs() -> None:
    model = random_rqae(RqaeConfig(12, codebook_dim=3, codebook_size=5, num_quantizers=5), seed=3)
    every = {row.kind: row for row in decoded_cosines(model, 10**7, seed=0)[0]}
    some = {row.kind: row for row in decoded_cosines(model, 20_000, seed=0)[0]}
    for kind in ("within a quantizer", "across quantizers"):
        assert some[kind].sampled == 20_000 < every[kind].sampled
        error = 4 * np.sqrt(every[kind].small * (1 - every[kind].small) / 20_000)
        assert some[kind].small == pytest.approx(every[kind].small, abs=error)
    assert decoded_cosines(model, 20_000, seed=0) == decoded_cosines(model, 20_000, seed=0)
    assert decoded_cosines(model, 20_000, seed=0) != decoded_cosines(model, 20_000, seed=1)


def test_quantizers_that_decode_to_zero_are_left_out() -> None:
    model = random_rqae(CONFIGS["grid"])
    model.w_out[1] = 0
    rows, _ = decoded_cosines(model, 10**6, seed=0)
    by_kind = {row.kind: row for row in rows}
    assert by_kind["within a quantizer"].sampled == by_kind["within a quantizer"].pairs * 3 // 4
    assert np.isfinite(by_kind["across quantizers"].mean)


def test_random_directions_are_as_the_formula_says() -> None:
    random = decoded_cosines(random_rqae(RqaeConfig(24, num_quantizers=2)), 10, seed=0)[0][-1]
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(2, 200_000, 24))
    cosines = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    assert (random.kind, random.pairs, random.sampled) == ("random directions", 0, 0)
    assert random.small == pytest.approx((np.abs(cosines) < 0.2).mean(), abs=5e-3)
    assert random.mean == pytest.approx(np.abs(cosines).mean(), abs=2e-3)
    x = np.linspace(-1, 1, 20_001)
    for dim in (4, 24, 576):
        density = cosine_density(x, dim)
        assert np.trapezoid(density, x) == pytest.approx(1, abs=1e-4)
        assert np.trapezoid(density * x**2, x) == pytest.approx(1 / dim, rel=1e-3)
    shown = np.histogram(cosines, 40, (-1, 1), density=True)[0]
    np.testing.assert_allclose(cosine_density(np.linspace(-0.975, 0.975, 40), 24), shown, atol=0.05)


def test_no_pairs_are_refused() -> None:
    with pytest.raises(BadConfig, match="pairs: expected at least 1; seen 0"):
        decoded_cosines(random_rqae(CONFIGS["grid"]), 0, seed=0)
