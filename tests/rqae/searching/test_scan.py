"""Search against the literal definition of intensity and a full sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqae import RQAE, RqaeConfig, RqaeError
from rqae.encoding.compiled import has_compiler
from rqae.features import intensity_literal
from rqae.searching.scan import Hits, _keys, _scores_and_rows, activity_thresholds, search
from tests.support.random_rqae import random_rqae

DEPTHS = (16, 1, 40, 16)


@pytest.fixture(scope="module")
def model() -> RQAE:
    return random_rqae(RqaeConfig(24, num_quantizers=40))


@pytest.fixture(params=["compiled", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr("rqae.searching.scan.has_compiler", lambda: False)
    return str(request.param)


def codes_of(model: RQAE, tokens: int, seed: int) -> torch.Tensor:
    return model.encode(torch.randn(tokens, 24, generator=torch.Generator().manual_seed(seed)))


def literal(model: RQAE, codes: torch.Tensor, features: torch.Tensor) -> np.ndarray:
    """(D, F, N)"""
    return torch.stack([intensity_literal(model, codes, features, depth).T for depth in DEPTHS]).numpy()


def check(found: Hits, expected: np.ndarray, k: int) -> None:
    """The best scores; each at a row that has it; where scores differ by more than rounding, at the row that it must be."""
    order = np.argsort(-expected, axis=2, kind="stable")[..., :k]
    best = np.take_along_axis(expected, order, axis=2)
    np.testing.assert_allclose(found.scores, best, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, found.rows, axis=2), best, atol=1e-5)
    assert all(len(set(rows)) == k for rows in found.rows.reshape(-1, k).tolist())
    gaps = np.diff(best, axis=2, prepend=np.inf, append=-np.inf)
    alone = (gaps[..., :-1] < -1e-4) & (gaps[..., 1:] < -1e-4)
    alone[..., -1] = False
    assert alone.any()
    np.testing.assert_array_equal(found.rows[alone], order[alone])


@pytest.mark.parametrize("tokens", [300, 1024, 1500])
def test_search_finds_the_best_tokens_at_every_depth(model: RQAE, path: str, tokens: int) -> None:
    codes, features = codes_of(model, tokens, 1), codes_of(model, 7, 2)
    found = search(model, codes.numpy().astype(np.uint16), features, DEPTHS, top_k=20)
    assert found.depths == DEPTHS and found.counts is None
    check(found, literal(model, codes, features), 20)


def test_counts_are_of_tokens_strictly_above(model: RQAE, path: str) -> None:
    codes, features = codes_of(model, 700, 3), codes_of(model, 5, 4)
    expected = literal(model, codes, features)
    thresholds = np.quantile(expected, 0.9, axis=2) + 1e-4
    found = search(model, codes.numpy().astype(np.uint16), features, DEPTHS, top_k=1, thresholds=thresholds)
    assert found.counts is not None
    sure = (np.abs(expected - thresholds[..., None]) > 1e-5).all(axis=2)
    assert sure.mean() > 0.5
    np.testing.assert_array_equal(found.counts[sure], (expected > thresholds[..., None]).sum(axis=2)[sure])


def test_thresholds_leave_at_most_the_density_above(model: RQAE, path: str) -> None:
    codes, features = codes_of(model, 1000, 5), codes_of(model, 6, 6)
    expected = np.sort(literal(model, codes, features), axis=2)[..., ::-1]
    found = activity_thresholds(model, codes.numpy().astype(np.uint16), features, DEPTHS, density=0.05)
    np.testing.assert_allclose(found, expected[..., 50], atol=1e-5)  # 50 of 1000 above the 51st


def test_one_token_per_context(model: RQAE, path: str) -> None:
    codes, features = codes_of(model, 1300, 7), codes_of(model, 4, 8)
    lengths = np.random.default_rng(0).integers(1, 40, 200)
    contexts = np.repeat(np.arange(200), lengths)[:1300]
    contexts[600:1250] = contexts[600]  # one that is longer than a tile
    expected = literal(model, codes, features)
    present = np.unique(contexts)
    best = np.stack([expected[..., contexts == context].max(axis=2) for context in present], axis=2)
    found = search(model, codes.numpy().astype(np.uint16), features, DEPTHS, top_k=10, contexts=contexts)
    np.testing.assert_allclose(found.scores, -np.sort(-best, axis=2)[..., :10], atol=1e-5)
    assert all(len(set(contexts[rows])) == 10 for rows in found.rows.reshape(-1, 10))
    np.testing.assert_allclose(np.take_along_axis(expected, found.rows, axis=2), found.scores, atol=1e-5)


def test_equal_tokens_come_in_their_order(model: RQAE, path: str) -> None:
    few = codes_of(model, 3, 9)
    codes = few[torch.arange(1200) % 3]
    found = search(model, codes.numpy().astype(np.uint16), few[:1], (40,), top_k=500)
    assert found.rows[0, 0, :400].tolist() == list(range(0, 1200, 3))
    assert np.allclose(found.scores[0, 0, :400], 1, atol=1e-5)


def test_fewer_tokens_than_asked_for(model: RQAE, path: str) -> None:
    codes = codes_of(model, 3, 1)
    found = search(model, codes.numpy().astype(np.uint16), codes, (4,), top_k=5)
    assert found.scores.shape == found.rows.shape == (1, 3, 5)
    assert np.isneginf(found.scores[..., 3:]).all() and (found.rows[..., 3:] == -1).all()
    assert sorted(found.rows[0, 0, :3].tolist()) == [0, 1, 2]
    empty = search(model, codes[:0].numpy().astype(np.uint16), codes, (4,), top_k=5)
    assert (empty.rows == -1).all()


def test_the_number_of_threads_changes_nothing(model: RQAE) -> None:
    codes, features = codes_of(model, 2100, 1).numpy().astype(np.uint16), codes_of(model, 5, 2)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(search(model, codes, features, DEPTHS, top_k=30))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        np.testing.assert_array_equal(other.rows, found[0].rows)
        np.testing.assert_array_equal(other.scores, found[0].scores)


def test_every_kind_of_codebook(path: str) -> None:
    for config in (RqaeConfig(24, 3, 7, 40), RqaeConfig(24, 5, 90, 40, "learned"), RqaeConfig(24, 4, 3, 40, "fsq")):
        model = random_rqae(config)
        codes, features = codes_of(model, 300, 1), codes_of(model, 3, 2)
        check(
            search(model, codes.numpy().astype(np.uint16), features, DEPTHS, top_k=5),
            literal(model, codes, features),
            5,
        )


floats = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30)


@settings(max_examples=200)
@given(floats)
def test_packed_scores_keep_their_order(values: list[float]) -> None:
    scores = torch.tensor([values])
    keys = _keys(scores, torch.arange(len(values)))
    order = keys[0].argsort(descending=True).tolist()
    assert order == sorted(range(len(values)), key=lambda i: (-values[i], i))
    back, rows = _scores_and_rows(keys, len(values))
    np.testing.assert_array_equal(back[0], scores[0].numpy())
    assert rows[0].tolist() == list(range(len(values)))


def test_what_cannot_be_searched_is_named(model: RQAE, path: str) -> None:
    codes = codes_of(model, 20, 1).numpy().astype(np.uint16)
    features = codes_of(model, 2, 2)
    with pytest.raises(RqaeError, match=r"search depths: expected 1 to 40; seen \[41\]"):
        search(model, codes, features, (41,))
    with pytest.raises(RqaeError, match="top_k"):
        search(model, codes, features, (4,), top_k=0)
    with pytest.raises(RqaeError, match="contexts: expected 20 numbers in ascending order"):
        search(model, codes, features, (4,), contexts=np.arange(20)[::-1])
    with pytest.raises(RqaeError, match="contexts"):
        search(model, codes, features, (4,), contexts=np.array([5] * 10 + [3] * 10, np.uint32))
    codes[7, 3] = 625
    with pytest.raises(RqaeError, match=r"RQAE codes: expected 0 to 624; seen [01] to 625"):
        search(model, codes, features, (4,))


@pytest.mark.skipif(not has_compiler(), reason="needs numba")
@given(st.lists(st.sampled_from([-1, -0.5, -0.0, 0.0, 1e-7, 0.25, 0.25000003, 1]), min_size=1, max_size=80), st.data())
def test_a_cut_keeps_the_best_and_of_equal_ones_the_earlier(values: list[float], data: st.DataObject) -> None:
    from rqae.searching.tiles import _cut

    k = data.draw(st.integers(1, len(values)))
    kept, rows = np.array(values, np.float32), np.arange(len(values), dtype=np.int64) * 7
    expected = np.sort(np.argsort(-kept, kind="stable")[:k])
    best = kept[expected]
    assert _cut(kept, rows, k, np.empty(len(values), np.int32)) == best.min()
    np.testing.assert_array_equal(kept[:k], best)
    np.testing.assert_array_equal(rows[:k], expected * 7)
