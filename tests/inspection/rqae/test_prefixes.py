"""Counting prefixes against sets of tuples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.errors import BadConfig, CorpusError
from evalkit.inspection.rqae import prefixes
from evalkit.inspection.rqae.prefixes import PrefixCount, count_prefixes


def literal(codes: np.ndarray, depth: int) -> PrefixCount:
    counts = Counter(tuple(row[:depth]) for row in codes.tolist())
    alone = sum(count for count in counts.values() if count == 1)
    return PrefixCount(depth, len(codes), len(counts), len(codes) / len(counts), alone / len(codes))


def check(codes: np.ndarray, depths: tuple[int, ...]) -> None:
    for found in count_prefixes(codes, depths):
        expected = literal(codes, found.depth)
        assert (found.depth, found.tokens, found.prefixes) == (expected.depth, expected.tokens, expected.prefixes)
        assert found.tokens_per_prefix == pytest.approx(expected.tokens_per_prefix, rel=1e-12)
        assert found.alone == pytest.approx(expected.alone, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 200),
    width=st.integers(1, 13),
    values=st.integers(1, 6),
    repeats=st.integers(1, 3),
)
def test_prefixes_are_the_different_tuples(seed: int, tokens: int, width: int, values: int, repeats: int) -> None:
    codes = np.random.default_rng(seed).integers(0, values, (tokens, width)).astype(np.uint16)
    check(np.tile(codes, (repeats, 1)), tuple(range(1, width + 1)))


def test_the_largest_codes_do_not_collide() -> None:
    codes = np.random.default_rng(0).choice(np.array([0, 1, 65534, 65535], np.uint16), (3000, 9))
    check(codes, (1, 2, 5, 9))


def test_depths_come_rising_and_once() -> None:
    codes = np.random.default_rng(1).integers(0, 5, (50, 8))
    assert [row.depth for row in count_prefixes(codes, (8, 2, 2, 5))] == [2, 5, 8]
    check(codes, (7,))


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_memory_mapped_codes_are_read_in_stretches(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "_ROWS", rows)
    codes = np.random.default_rng(2).integers(0, 4, (300, 10)).astype("<u2")
    codes.tofile(tmp_path / "codes")
    check(np.memmap(tmp_path / "codes", "<u2", "r", shape=codes.shape), (1, 3, 4, 5, 10))


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(CorpusError, match="corpus: expected at least one valid token; seen none"):
        count_prefixes(np.empty((0, 4), np.uint16), (1,))
    for depths in ((0, 1), (5,), ()):
        with pytest.raises(BadConfig, match="depths: expected depths from 1 to 4"):
            count_prefixes(np.zeros((3, 4), np.uint16), depths)
