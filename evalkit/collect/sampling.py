"""Draws windows: those that show a feature to an explainer, and those that test the explanation.

Pure functions of numbers. Every draw is by hashed priority, so it does not depend on the order in which windows were
found. Knows the grid, the activations and the counts asked for; knows no text. Reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from evalkit.corpus.windows import Grid
from evalkit.records import Activations, FeatureId
from evalkit.seeds import derive, hash_priorities

__all__ = ["WAYS", "Counts", "Draw", "FeatureWindows", "PoolDraw", "draw_windows", "order_by", "spread", "windows_of"]

WAYS = ("deciles", "top", "random", "importance", "mixed")  # how active windows are chosen, see ``order_by``

NEGATIVE_POOL = 4096  # windows of one pool that negatives are drawn from
_DECILES = 10


@dataclass(frozen=True, slots=True)
class Counts:
    """How many windows to draw per feature. ``explain_by``, ``positives_by``: how to draw active ones (see ``WAYS``)."""

    explain: int
    positives: int
    negatives: int
    explain_by: str = "deciles"
    positives_by: str = "deciles"

    @property
    def least_active(self) -> int:
        """Fewer active windows than this in either pool make a feature ineligible."""
        return self.positives


@dataclass(frozen=True, slots=True, eq=False)
class FeatureWindows:
    """The active windows of one feature: rows into the grid (window,), peaks (window,), activations (window, pos)."""

    rows: NDArray[np.int64]
    peaks: NDArray[np.float32]
    activations: NDArray[np.float32]
    n_active_tokens: int
    maximum: float


@dataclass(frozen=True, slots=True, eq=False)
class PoolDraw:
    """Windows of one pool: indices into FeatureWindows for the active roles, rows into the grid for negatives."""

    shown: NDArray[np.int64]
    positives: NDArray[np.int64]
    decoys: NDArray[np.int64]
    negatives: NDArray[np.int64]
    shown_negatives: NDArray[np.int64]
    deciles: NDArray[np.int64]  # (active window of the feature,), -1 outside this pool


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """What was drawn for a feature, or why nothing was (``reason``)."""

    explain: PoolDraw | None
    score: PoolDraw | None
    reason: str | None


def windows_of(activations: Activations, n_features: int, grid: Grid) -> list[FeatureWindows]:
    """Group a source's active tokens by feature and grid window. Activations of inactive tokens are 0."""
    order = np.argsort(activations.features, kind="stable")
    bounds = np.searchsorted(activations.features[order], np.arange(n_features + 1))
    found = []
    for feature in range(n_features):
        picked = order[bounds[feature] : bounds[feature + 1]]
        values = activations.values[picked]
        rows, positions = grid.window_of(activations.tokens[picked])
        inside = rows >= 0
        unique, inverse = np.unique(rows[inside], return_inverse=True)
        dense = np.zeros((len(unique), grid.window_length), dtype=np.float32)
        dense[inverse, positions[inside]] = values[inside]
        peaks = dense.max(axis=1) if len(unique) else np.zeros(0, dtype=np.float32)
        found.append(FeatureWindows(unique, peaks, dense, len(picked), float(values.max(initial=0.0))))
    return found


def spread(deciles: NDArray[np.int64], priorities: NDArray[np.uint64]) -> NDArray[np.int64]:
    """An order of the windows in which every prefix covers the deciles as evenly as possible.

    Within a decile windows follow their priority; deciles take turns, the turn order inside a round being random too.
    """
    by_decile = np.lexsort((priorities, deciles))
    counts = np.bincount(deciles, minlength=_DECILES)
    first = np.concatenate(([0], np.cumsum(counts)[:-1]))
    rounds = np.empty(len(deciles), dtype=np.int64)
    rounds[by_decile] = np.arange(len(deciles)) - first[deciles[by_decile]]
    order: np.ndarray = np.lexsort((priorities, rounds))
    return order


def order_by(
    way: str,
    peaks: NDArray[np.float32],
    deciles: NDArray[np.int64],
    priorities: NDArray[np.uint64],
    places: NDArray[np.int64],
) -> NDArray[np.int64]:
    """An order of a feature's active windows, of which the first are taken. All arrays are (window,).

    ``way``:

    - "deciles" spreads over the activation deciles.
    - "random" is uniform.
    - "top" takes the strongest first: one per document (``places``), then the others.
    - "importance" draws without replacement with probability ∝ peak² (keys log(u)/w of Efraimidis & Spirakis 2006).
    - "mixed" alternates between "top" and "importance".
    """
    match way:
        case "random":
            return np.argsort(priorities)
        case "top":
            strongest = np.lexsort((priorities, -peaks.astype(np.float64)))
            first = np.zeros(len(peaks), np.bool_)
            first[strongest[np.unique(places[strongest], return_index=True)[1]]] = True
            return np.concatenate([strongest[first[strongest]], strongest[~first[strongest]]])
        case "importance":
            uniform = (priorities.astype(np.float64) + 1) / 2.0**64
            keys = np.log(uniform) / np.maximum(peaks.astype(np.float64) ** 2, 1e-300)
            weighted: NDArray[np.int64] = np.lexsort((priorities, -keys))
            return weighted
        case "mixed":
            turns = [order_by(one, peaks, deciles, priorities, places) for one in ("top", "importance")]
            both = np.stack(turns, axis=1).ravel()
            kept: NDArray[np.int64] = both[np.sort(np.unique(both, return_index=True)[1])]
            return kept
    return spread(deciles, priorities)


def draw_windows(
    windows: FeatureWindows, grid: Grid, counts: Counts, *, source: str, feature: FeatureId, seed: int
) -> Draw:
    """Draw the windows of all roles for one feature, or give the reason why it is ineligible.

    Explain pool: up to ``counts.explain`` windows to show, but at most half of the active ones; the rest calibrates the
    judges. Score pool: positives and decoys, which are disjoint and have similar activation deciles; at most half are
    decoys. If there are fewer positives than requested, there are fewer negatives in proportion, because F1 and AUPRC
    depend on the ratio.
    """
    draws = []
    for pool, name in enumerate(("explain", "score")):
        mine = np.flatnonzero(grid.pools[windows.rows] == pool)
        if len(mine) < counts.least_active:
            reason = f"active in {len(mine)} windows of the {name} pool, {counts.least_active} needed"
            return Draw(None, None, reason)
        negatives = _negatives(windows, grid, pool, derive(seed, "negatives", source, feature), seed)
        if len(negatives) < counts.negatives:
            reason = f"inactive in {len(negatives)} windows of the {name} pool, {counts.negatives} needed"
            return Draw(None, None, reason)
        key = derive(seed, "positives", name, source, feature)
        draws.append(_draw_pool(windows, grid, mine, negatives, counts, key, show=pool == 0))
    return Draw(draws[0], draws[1], None)


def _draw_pool(
    windows: FeatureWindows,
    grid: Grid,
    mine: NDArray[np.int64],
    negatives: NDArray[np.int64],
    counts: Counts,
    key: int,
    *,
    show: bool,
) -> PoolDraw:
    priorities = hash_priorities(key, windows.rows[mine])
    ranks = np.empty(len(mine), dtype=np.int64)
    ranks[np.lexsort((priorities, windows.peaks[mine]))] = np.arange(len(mine))
    local = ranks * _DECILES // len(mine)
    places = grid.documents[windows.rows[mine]]
    n_shown = min(counts.explain, len(mine) // 2) if show else 0
    shown = mine[order_by(counts.explain_by, windows.peaks[mine], local, priorities, places)[:n_shown]]
    order = mine[order_by(counts.positives_by, windows.peaks[mine], local, priorities, places)]
    taken = order[~np.isin(order, shown)][: 2 * counts.positives]
    deciles = np.full(len(windows.rows), -1, dtype=np.int64)
    deciles[mine] = local
    taken = taken[np.argsort(deciles[taken], kind="stable")]  # taken in turn, so that both halves span the deciles
    return PoolDraw(
        shown=shown[np.lexsort((windows.rows[shown], -windows.peaks[shown]))],
        positives=taken[::2],
        decoys=taken[1::2],
        negatives=negatives[: round(counts.negatives * len(taken[::2]) / counts.positives)],
        shown_negatives=negatives[counts.negatives : counts.negatives + (counts.explain if show else 0)],
        deciles=deciles,
    )


def _negatives(windows: FeatureWindows, grid: Grid, pool: int, key: int, seed: int) -> NDArray[np.int64]:
    """Grid rows of verified inactive windows, drawn per feature from one uniform pool of windows shared by all."""
    shared = _shared_pool(grid, pool, seed)
    inactive = shared[~np.isin(shared, windows.rows, assume_unique=True)]
    return inactive[np.argsort(hash_priorities(key, inactive))]


@lru_cache(maxsize=4)
def _shared_pool(grid: Grid, pool: int, seed: int) -> NDArray[np.int64]:
    rows = np.flatnonzero(grid.pools == pool)
    priorities = hash_priorities(derive(seed, "negative pool"), grid.ids[rows])
    return rows[np.argsort(priorities)[:NEGATIVE_POOL]]
