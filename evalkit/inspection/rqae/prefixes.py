"""Counts the distinct code prefixes in a corpus at each depth, and the tokens whose prefix is unique.

The counts are exact and need no hashing: tokens are grouped by equal prefixes, one quantizer after the other. A token that
is alone in its group stays alone at greater depths and is dropped. After three or four quantizers few tokens are left, so
that deep prefixes cost almost nothing. Needs about 100 bytes per token; codes may be memory-mapped. Uses no text and no
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import BadConfig, CorpusError
from evalkit.protocols import Progress
from evalkit.util.progress import SILENT

__all__ = ["PrefixCount", "count_prefixes"]

_COLUMNS = 4  # quantizers read at the same time
_ROWS = 1 << 20  # tokens read at the same time


@dataclass(frozen=True, slots=True)
class PrefixCount:
    """The counts for one depth. ``alone``: share of tokens whose prefix no other token of the corpus has."""

    depth: int
    tokens: int
    prefixes: int
    tokens_per_prefix: float
    alone: float


def count_prefixes(codes: NDArray[np.integer], depths: Sequence[int], progress: Progress = SILENT) -> list[PrefixCount]:
    """Count the distinct rows of ``codes[:, :depth]`` for each of ``depths``; ``codes`` is (token, quantizer).

    Returns one entry per depth, ascending. Raises CorpusError if there are no tokens, and BadConfig for a depth that is not
    in ``codes``.
    """
    total, limit = codes.shape
    wanted = sorted(set(depths))
    if not total:
        raise CorpusError("corpus", expected="at least one valid token", seen="none", fix="use a longer corpus")
    if not wanted or not 0 < wanted[0] <= wanted[-1] <= limit:
        raise BadConfig(
            "depths", expected=f"depths from 1 to {limit}", seen=str(list(depths)), fix="use depths in this range"
        )
    task = progress.start("count prefixes", wanted[-1], "quantizers")
    rows = np.arange(total)  # rows of the tokens that share their prefix with others
    groups = np.zeros(total, np.int64)  # number of the prefix of each of these tokens
    shared, found = 1, []
    for low in range(0, wanted[-1], _COLUMNS):
        high = min(low + _COLUMNS, wanted[-1])
        block, places = _read(codes, rows, low, high), np.arange(len(rows))  # (row, high - low)
        for column in range(high - low):
            chosen = block[places, column].astype(np.int64)
            groups, together, shared = _split(groups, chosen)
            places, groups = places[together], groups[together]
            if (depth := low + column + 1) in wanted:
                prefixes = shared + total - len(places)
                found.append(PrefixCount(depth, total, prefixes, total / prefixes, 1 - len(places) / total))
        rows = rows[places]
        progress.advance(task, high - low)
    progress.finish(task)
    return found


def _split(groups: NDArray[np.int64], codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_], int]:
    """Splits groups by code: the new group of each token, whether it is shared, and the number of shared groups."""
    if not len(groups):
        return groups, np.zeros(0, np.bool_), 0
    _, finer, counts = np.unique(groups * (int(codes.max()) + 1) + codes, return_inverse=True, return_counts=True)
    return finer.astype(np.int64), counts[finer] > 1, int((counts > 1).sum())


def _read(codes: NDArray[np.integer], rows: NDArray[np.int64], low: int, high: int) -> NDArray[np.integer]:
    """``codes[rows, low:high]``, read in blocks of rows."""
    parts = [codes[rows[start : start + _ROWS], low:high] for start in range(0, len(rows), _ROWS)]
    return np.concatenate(parts) if parts else np.empty((0, high - low), codes.dtype)
