from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.collect.sampling import WAYS, Counts, Draw, draw_windows, order_by, spread, windows_of
from evalkit.corpus.windows import Grid, build_grid
from evalkit.records import Activations
from evalkit.seeds import hash_priorities
from tests.support.array_corpus import random_corpus

COUNTS = Counts(explain=12, positives=10, negatives=10)


@pytest.fixture(scope="module")
def grid() -> Grid:
    return build_grid(random_corpus(n=400), window_length=16, skip_first=1, seed=0)


def activations(density: float, seed: int = 0, n_features: int = 3, n_tokens: int = 400 * 64) -> Activations:
    generator = np.random.default_rng(seed)
    tokens, features = np.nonzero(generator.random((n_tokens, n_features)) < density)
    values = generator.exponential(size=len(tokens)).astype(np.float32) + 0.1
    return Activations(tokens, features, values, n_tokens)


def draw(one: Activations, grid: Grid, feature: int = 0, seed: int = 0, counts: Counts = COUNTS) -> Draw:
    windows = windows_of(one, 3, grid)[feature]
    return draw_windows(windows, grid, counts, source="s", feature=str(feature), seed=seed)


def test_windows_of_equals_a_loop_over_tokens(grid: Grid) -> None:
    given_ = activations(0.02)
    dense = np.zeros((400 * 64, 3), dtype=np.float32)
    dense[given_.tokens, given_.features] = given_.values
    for feature, windows in enumerate(windows_of(given_, 3, grid)):
        expected = {}
        for row in range(len(grid)):
            first = grid.contexts[row] * 64 + grid.starts[row]
            piece = dense[first : first + 16, feature]
            if piece.any():
                expected[row] = piece
        assert windows.rows.tolist() == list(expected)
        assert np.array_equal(windows.activations, np.stack(list(expected.values())))
        assert np.array_equal(windows.peaks, windows.activations.max(axis=1))
        assert windows.n_active_tokens == int((dense[:, feature] > 0).sum())
        assert windows.maximum == dense[:, feature].max()


@settings(max_examples=25, deadline=None)
@given(density=st.floats(0.004, 0.05), seed=st.integers(0, 50))
def test_roles_are_disjoint_and_pools_hold(density: float, seed: int) -> None:
    grid = build_grid(random_corpus(n=400), window_length=16, skip_first=1, seed=0)
    given_ = activations(density, seed)
    windows = windows_of(given_, 3, grid)[1]
    drawn = draw_windows(windows, grid, COUNTS, source="s", feature="1", seed=seed)
    if drawn.explain is None or drawn.score is None:
        assert drawn.reason is not None
        return
    for pool, one in enumerate((drawn.explain, drawn.score)):
        active = [*one.shown, *one.positives, *one.decoys]
        assert len(set(active)) == len(active)
        rows = windows.rows[active]
        assert (grid.pools[rows] == pool).all()
        negatives = [*one.negatives, *one.shown_negatives]
        assert len(set(negatives)) == len(negatives)
        assert (grid.pools[negatives] == pool).all()
        assert not set(negatives) & set(windows.rows.tolist())  # verified: the feature is nowhere active in them
        assert len(one.negatives) == len(one.positives)  # classes stay balanced where positives are few
        assert 0 <= len(one.positives) - len(one.decoys) <= 1
    documents = [
        set(grid.documents[windows.rows[[*one.shown, *one.positives, *one.decoys]]].tolist())
        for one in (drawn.explain, drawn.score)
    ]
    assert not documents[0] & documents[1]


def test_positives_are_spread_over_the_deciles(grid: Grid) -> None:
    one = draw(activations(0.05), grid)
    assert one.score is not None
    deciles = one.score.deciles
    assert Counter(deciles[one.score.positives].tolist()) == dict.fromkeys(range(10), 1)
    assert Counter(deciles[one.score.decoys].tolist()) == dict.fromkeys(range(10), 1)


def test_deciles_follow_the_peaks(grid: Grid) -> None:
    given_ = activations(0.05)
    windows = windows_of(given_, 3, grid)[0]
    one = draw_windows(windows, grid, COUNTS, source="s", feature="0", seed=0)
    assert one.score is not None
    mine = np.flatnonzero(one.score.deciles >= 0)
    groups = [windows.peaks[mine][one.score.deciles[mine] == decile] for decile in range(10)]
    for lower, upper in itertools.pairwise(groups):
        assert lower.max() <= upper.min()
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_order_of_arrival_changes_nothing(grid: Grid) -> None:
    given_ = activations(0.02)
    order = np.random.default_rng(1).permutation(len(given_.tokens))
    shuffled = Activations(given_.tokens[order], given_.features[order], given_.values[order], given_.n_tokens)
    first, second = draw(given_, grid), draw(shuffled, grid)
    for name in ("shown", "positives", "decoys", "negatives", "shown_negatives"):
        assert np.array_equal(getattr(first.explain, name), getattr(second.explain, name))
        assert np.array_equal(getattr(first.score, name), getattr(second.score, name))


def test_seeds_draw_differently(grid: Grid) -> None:
    first, second = draw(activations(0.05), grid, seed=0), draw(activations(0.05), grid, seed=1)
    assert first.score is not None and second.score is not None
    assert set(first.score.positives.tolist()) != set(second.score.positives.tolist())
    assert set(first.score.negatives.tolist()) != set(second.score.negatives.tolist())


def test_rare_dense_and_silent_features_are_ineligible(grid: Grid) -> None:
    rare = draw(activations(0.0004), grid)
    assert rare.reason is not None and rare.reason.endswith("windows of the explain pool, 10 needed")
    dense = draw(activations(0.9), grid)
    assert dense.reason == "inactive in 0 windows of the explain pool, 10 needed"
    silent = draw(Activations(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32), 100), grid)
    assert silent.reason == "active in 0 windows of the explain pool, 10 needed"


def test_a_constant_activation_has_random_deciles(grid: Grid) -> None:
    given_ = activations(0.05)
    flat = Activations(given_.tokens, given_.features, np.ones_like(given_.values), given_.n_tokens)
    one = draw(flat, grid)
    assert one.score is not None
    rows = windows_of(flat, 3, grid)[0].rows[one.score.deciles == 0]
    assert rows.max() > len(grid) * 0.7  # not the first tenth of the corpus


def test_every_prefix_of_a_spread_is_even() -> None:
    deciles = np.repeat(np.arange(10), [9, 9, 9, 9, 1, 9, 9, 9, 9, 9])
    order = spread(deciles, np.random.default_rng(0).integers(0, 1 << 62, len(deciles)).astype(np.uint64))
    assert sorted(order.tolist()) == list(range(len(deciles)))
    for length in range(1, 40):
        counts = Counter(deciles[order[:length]].tolist())
        full = [counts[decile] for decile in range(10) if decile != 4]
        assert max(full) - min(full) <= 1


def ordered(way: str, peaks: np.ndarray, seed: int = 0, places: np.ndarray | None = None) -> np.ndarray:
    priorities = hash_priorities(seed, np.arange(len(peaks)))
    deciles = np.argsort(np.argsort(peaks)) * 10 // len(peaks)
    return order_by(way, peaks, deciles, priorities, np.arange(len(peaks)) if places is None else places)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_an_order_that_the_seed_and_not_the_place_decides(way: str) -> None:
    peaks = np.random.default_rng(0).permutation(np.arange(1, 61)).astype(np.float32)
    order = ordered(way, peaks)
    assert sorted(order.tolist()) == list(range(60))
    assert ordered(way, peaks).tolist() == order.tolist()
    assert way == "top" or ordered(way, peaks, seed=1).tolist() != order.tolist()
    moved = np.random.default_rng(1).permutation(60)
    priorities = hash_priorities(0, np.arange(60))
    deciles = np.argsort(np.argsort(peaks)) * 10 // 60
    again = order_by(way, peaks[moved], deciles[moved], priorities[moved], moved)
    assert moved[again].tolist() == order.tolist()


def test_the_strongest_come_first_each_from_a_document_of_its_own() -> None:
    peaks = np.array([9, 8, 7, 6, 5, 4], dtype=np.float32)
    assert ordered("top", peaks).tolist() == [0, 1, 2, 3, 4, 5]
    assert ordered("top", peaks, places=np.array([1, 1, 2, 1, 3, 2])).tolist() == [0, 2, 4, 1, 3, 5]


def test_importance_draws_in_proportion_to_the_squared_activation() -> None:
    peaks = np.array([1, 2, 3, 4], dtype=np.float32)
    share = peaks.astype(np.float64) ** 2 / (peaks.astype(np.float64) ** 2).sum()
    drawn = [ordered("importance", peaks, seed) for seed in range(20_000)]
    first = np.bincount([order[0] for order in drawn], minlength=4) / len(drawn)
    assert first == pytest.approx(share, abs=0.012)
    pairs = Counter((order[0], order[1]) for order in drawn)  # without replacement: the rest in proportion again
    for a, b in itertools.permutations(range(4), 2):
        assert pairs[a, b] / len(drawn) == pytest.approx(share[a] * share[b] / (1 - share[a]), abs=0.012)


def test_mixed_takes_turns() -> None:
    peaks = np.arange(1, 41, dtype=np.float32)
    order = ordered("mixed", peaks)
    top = {39, 38, 37, 36, 35}
    importance = ordered("importance", peaks)
    assert set(order[:10].tolist()) >= top
    assert set(order[:10].tolist()) - top <= set(importance[:10].tolist())


@pytest.mark.parametrize("way", WAYS)
def test_the_ways_decide_what_is_shown_and_what_is_tested(way: str, grid: Grid) -> None:
    one = activations(0.03)
    windows = windows_of(one, 3, grid)[0]
    chosen = draw(one, grid, counts=Counts(12, 10, 10, explain_by=way, positives_by=way))
    usual = draw(one, grid)
    assert chosen.explain is not None and chosen.score is not None and usual.explain is not None
    for pool in (chosen.explain, chosen.score):
        roles = [pool.shown, pool.positives, pool.decoys]
        assert len(np.unique(np.concatenate(roles))) == sum(map(len, roles))
    assert (len(chosen.explain.shown), len(chosen.score.positives)) == (12, 10)
    mean, other = (windows.peaks[one.shown].mean() for one in (chosen.explain, usual.explain))
    assert way in ("deciles", "random") or mean > other
    if way == "top":
        mine = np.flatnonzero(grid.pools[windows.rows] == 1)
        taken = np.concatenate([chosen.score.positives, chosen.score.decoys])
        documents = grid.documents[windows.rows[taken]]
        assert len(set(documents.tolist())) == len(taken)
        assert windows.peaks[mine].max() in windows.peaks[taken]
