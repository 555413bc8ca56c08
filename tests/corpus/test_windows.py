from __future__ import annotations

import numpy as np
import pytest

from evalkit.corpus.windows import build_grid
from evalkit.errors import CorpusError
from tests.support.array_corpus import ArrayCorpus, random_corpus


def test_windows_are_inside_contexts_and_never_overlap() -> None:
    corpus = random_corpus()
    grid = build_grid(corpus, window_length=16, skip_first=1, seed=0)
    covered = np.zeros(corpus.tokens.shape, dtype=int)
    for context, start in zip(grid.contexts, grid.starts, strict=True):
        assert 1 <= start <= 64 - 16
        covered[context, start : start + 16] += 1
    assert covered.max() == 1
    assert len(grid) == 200 * 3
    assert len(set(grid.offsets.tolist())) > 10  # the offset is drawn per context
    assert np.all(np.diff(grid.ids) > 0)


def test_window_of_inverts_the_grid() -> None:
    corpus = random_corpus(n=50)
    grid = build_grid(corpus, window_length=16, skip_first=1, seed=3)
    found_row, found_position = grid.window_of(np.arange(corpus.tokens.size))
    expected = np.full(corpus.tokens.size, -1)
    for row in range(len(grid)):
        first = grid.contexts[row] * 64 + grid.starts[row]
        expected[first : first + 16] = row
    assert np.array_equal(found_row, expected)
    inside = expected >= 0
    starts = grid.contexts[expected[inside]] * 64 + grid.starts[expected[inside]]
    assert np.array_equal(found_position[inside], np.flatnonzero(inside) - starts)


def test_windows_with_masked_tokens_are_not_used() -> None:
    corpus = random_corpus(low=0)
    corpus.tokens[:, 30] = 0
    grid = build_grid(corpus, window_length=16, skip_first=1, seed=0)
    for context, start in zip(grid.contexts, grid.starts, strict=True):
        assert (corpus.tokens[context, start : start + 16] != 0).all()


def test_texts_that_repeat_are_kept_once() -> None:
    """Same tokens at the same place of another document: the copy goes, whichever pool it is in."""
    corpus = random_corpus(n=60, length=17)  # one window per context, always at position 1
    corpus.tokens[30:] = corpus.tokens[:30]
    grid = build_grid(corpus, window_length=16, skip_first=1, seed=0)
    assert grid.n_duplicates == 30
    assert grid.contexts.tolist() == list(range(30))


def test_pools_split_documents_by_hash() -> None:
    corpus = random_corpus(n=3000)
    grid = build_grid(corpus, window_length=16, skip_first=1, seed=0)
    by_pool = [set(grid.documents[grid.pools == pool].tolist()) for pool in (0, 1)]
    assert not by_pool[0] & by_pool[1]
    assert 420 < len(by_pool[0]) < 580
    assert np.array_equal(grid.pools, grid.context_pools[grid.contexts])
    other = build_grid(corpus, window_length=16, skip_first=1, seed=1)
    assert not np.array_equal(grid.context_pools, other.context_pools)


def test_copies_of_documents_share_a_pool_and_are_used_once() -> None:
    """Every document twice, at other places of the corpus: no text of one pool is in the other."""
    corpus = random_corpus(n=600)
    corpus.tokens[300:] = corpus.tokens[:300]
    grid = build_grid(corpus, window_length=16, skip_first=1, seed=0)
    assert np.array_equal(grid.context_pools[:300], grid.context_pools[300:])
    assert grid.contexts.max() < 300
    assert grid.n_duplicates == 300 * 3


def test_too_short_contexts_are_an_error() -> None:
    with pytest.raises(CorpusError, match="contexts of at least 33 tokens; seen contexts of 32"):
        build_grid(random_corpus(length=32), window_length=32, skip_first=1, seed=0)
    empty = ArrayCorpus(np.zeros((4, 64), dtype=np.int64))
    with pytest.raises(CorpusError, match="at least one window of 16 unmasked tokens; seen none in 4 contexts"):
        build_grid(empty, window_length=16, skip_first=1, seed=0)
