"""The number of distinct code prefixes in a corpus at each depth, and of tokens whose prefix is unique.

Exact, without hashing: tokens are grouped by equal prefixes, one quantizer after the other. A token that is alone in its
group stays alone at greater depth and is dropped. After three or four quantizers few are left, so deep prefixes cost almost
nothing. Needs about 100 bytes per token; codes may be memory-mapped. Uses no text and no models.
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

_COLUMNS = 4  # quantizers read at a time
_ROWS = 1 << 20  # tokens read at a time


@dataclass(frozen=True, slots=True)
class PrefixCount:
    """One depth. ``alone``: the share of tokens whose prefix no other token of the corpus has."""

    depth: int
    tokens: int
    prefixes: int
    tokens_per_prefix: float
    alone: float


def count_prefixes(codes: NDArray[np.integer], depths: Sequence[int], progress: Progress = SILENT) -> list[PrefixCount]:
    """Count the different rows of ``codes[:, :depth]`` for each of ``depths``, rising; codes (token, quantizer).

    Raises CorpusError for no tokens, BadConfig for a depth beyond the codes.
    """
    total, limit = codes.shape
    wanted = sorted(set(depths))
    if not total:
        raise CorpusError("corpus", expected="at least one valid token", seen="none", fix="use a longer corpus")
    if not wanted or not 0 < wanted[0] <= wanted[-1] <= limit:
        raise BadConfig(
            "depths", expected=f"depths from 1 to {limit}", seen=str(list(depths)), fix="name depths that were encoded"
        )
    task = progress.start("count prefixes", wanted[-1], "quantizers")
    rows = np.arange(total)  # of the tokens that share their prefix with others
    groups = np.zeros(total, np.int64)  # which prefix each of these has
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
    """The finer groups of (group, code), which tokens are not alone in theirs, and how many groups these make."""
    if not len(groups):
        return groups, np.zeros(0, np.bool_), 0
    _, finer, counts = np.unique(groups * (int(codes.max()) + 1) + codes, return_inverse=True, return_counts=True)
    return finer.astype(np.int64), counts[finer] > 1, int((counts > 1).sum())


def _read(codes: NDArray[np.integer], rows: NDArray[np.int64], low: int, high: int) -> NDArray[np.integer]:
    """``codes[rows, low:high]``, a stretch of rows at a time."""
    parts = [codes[rows[start : start + _ROWS], low:high] for start in range(0, len(rows), _ROWS)]
    return np.concatenate(parts) if parts else np.empty((0, high - low), codes.dtype)
