"""Exact search: the tokens of a corpus with the highest intensity of each feature, and how many tokens are active.

Intensity is a dot product of scaled code vectors (see ``rqae.features``), so features times tokens are matrix products over
tiles of tokens: a tile's codes are decoded and multiplied, partial sums are read out at each depth, and only the best
scores are kept. Codes may be memory-mapped; other memory is bounded by the tile size and by the number of kept scores.
Tiling changes results by rounding only. Uses no text and no language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rqae.encoding.blocked import full_precision, one_thread_each
from rqae.encoding.codebook import normalised
from rqae.encoding.compiled import has_compiler
from rqae.encoding.products import added_product, product
from rqae.errors import RqaeError
from rqae.features import layer_weights, scaled_vectors
from rqae.model import RQAE

__all__ = ["Hits", "activity_thresholds", "search"]

_TILE = 512  # tokens; with a thousand code dimensions, a tile and its product fit into the CPU cache
_DEVICE_TILE = 1 << 16


@dataclass(frozen=True, slots=True)
class Hits:
    """The best tokens of each feature at each depth.

    ``depths``: in the order of the call.
    ``scores``, ``rows``: (D, F, k), in descending order, ties by row; -inf and -1 if there are fewer than k tokens.
    ``counts``: (D, F), tokens above the thresholds; None if no thresholds were given.
    """

    depths: tuple[int, ...]
    scores: NDArray[np.float32]
    rows: NDArray[np.int64]
    counts: NDArray[np.int64] | None = None


_Found: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]


class _Best(Protocol):
    """Accumulates the best scores over tiles, which must come in ascending order of rows."""

    def take(self, depth: int, sums: Tensor, total: float, first: int, segments: NDArray[np.int64]) -> None:
        """Add a tile: sums (F, T) = scores × ``total`` at the ``depth``-th depth, its first row, starts of its contexts."""

    def result(self) -> _Found:
        """The best scores and their rows, both (D, F, k)."""


def search(
    model: RQAE,
    codes: NDArray[np.integer] | Tensor,
    features: Tensor,
    depths: Sequence[int],
    *,
    top_k: int = 100,
    contexts: NDArray[np.integer] | None = None,
    thresholds: NDArray[np.floating] | None = None,
) -> Hits:
    """The ``top_k`` tokens of codes (N, K) with the highest intensity of features (F, K) at each of ``depths``.

    contexts: (N,), ascending, the context of each token; if given, only the best token of each context is returned.
    thresholds: (D, F); tokens strictly above them are counted as active.

    Runs on the model's device; a GPU holds one tile at a time. Raises RqaeError.
    """
    deepest = _checked(model, codes, features, depths, top_k)
    scorer = _Scorer.of(model, features[:, :deepest], depths)
    if contexts is not None and (len(contexts) != len(codes) or bool((contexts[1:] < contexts[:-1]).any())):
        raise RqaeError(
            "contexts",
            expected=f"{len(codes)} numbers in ascending order",
            seen="another order or length",
            fix="sort tokens by context",
        )
    compiled = scorer.device.type == "cpu" and has_compiler()
    bounds = _bounds(len(codes), _TILE if scorer.device.type == "cpu" else _DEVICE_TILE, contexts)
    limits = None if thresholds is None else torch.as_tensor(thresholds, dtype=torch.float32, device=scorer.device)
    kind = _CompiledBest if compiled else _KeyedBest

    def walk(tile_bounds: Sequence[tuple[int, int]]) -> tuple[_Found, Tensor]:
        best: _Best = kind(len(depths), len(features), top_k)
        counts = torch.zeros(len(depths), len(features), dtype=torch.int64, device=scorer.device)
        scratch: dict[int, Tensor] = {}
        for low, high in tile_bounds:
            segments = np.empty(0, np.int64) if contexts is None else _segments(contexts[low:high])
            for index, sums, total in scorer.sums(codes[low:high], scratch):
                best.take(index, sums, total, low, segments)
                if limits is not None:
                    counts[index] += (_scores(sums, total) > limits[index][:, None]).sum(dim=1)
        return best.result(), counts

    threads = torch.get_num_threads() if scorer.device.type == "cpu" else 1
    share = max(1, -(-len(bounds) // threads))
    with full_precision():
        walked = one_thread_each(walk, [bounds[at : at + share] for at in range(0, len(bounds), share)])
    scores, rows = _merge([best for best, _ in walked], len(depths), len(features), top_k)
    counted = (
        None if limits is None else sum((counts for _, counts in walked), torch.zeros_like(limits, dtype=torch.int64))
    )
    return Hits(tuple(depths), scores, rows, None if counted is None else counted.cpu().numpy())


def activity_thresholds(
    model: RQAE, codes: NDArray[np.integer] | Tensor, features: Tensor, depths: Sequence[int], density: float = 0.01
) -> NDArray[np.float32]:
    """θ (D, F): the lowest value that at most the share ``density`` of the tokens exceeds strictly.

    Exact: the intensity at that rank over all tokens.
    """
    if not 0 < density < 1 or len(codes) == 0:
        raise RqaeError(
            "density",
            expected="a share between 0 and 1, and at least one token",
            seen=f"{density} and {len(codes)} tokens",
            fix="use for example 0.01, and pass the codes of some tokens",
        )
    rank = int(density * len(codes) + 1e-9) + 1
    return search(model, codes, features, depths, top_k=rank).scores[:, :, -1]


@dataclass(frozen=True, slots=True)
class _Scorer:
    """Scores of all features on a tile of codes, depth after depth."""

    table: Tensor  # (n_q, K, c): scaled code vectors
    right: tuple[Tensor, ...]  # for each step, (F, (high - low) · c): scaled code vectors of the features
    steps: tuple[tuple[int, int, tuple[int, ...]], ...]  # low, high; indices of the requested depths that equal high
    totals: tuple[float, ...]  # (n_q,): sums of layer weights

    @classmethod
    def of(cls, model: RQAE, features: Tensor, depths: Sequence[int]) -> _Scorer:
        deepest = features.shape[1]
        weights = layer_weights(model)
        table = normalised(model.codebook[:deepest]) * weights[:deepest, None, None].sqrt()
        places = {depth: tuple(i for i, each in enumerate(depths) if each == depth) for depth in sorted(set(depths))}
        steps = tuple((low, high, places[high]) for low, high in pairwise([0, *places]))
        vectors, width = scaled_vectors(model, features.to(table.device)), table.shape[2]  # (F, k · c)
        right = tuple(vectors[:, low * width : high * width].contiguous() for low, high, _ in steps)
        return cls(table, right, steps, tuple(weights.cumsum(dim=0).tolist()))

    @property
    def device(self) -> torch.device:
        return self.table.device

    def sums(
        self, codes: NDArray[np.integer] | Tensor, scratch: dict[int, Tensor]
    ) -> Iterator[tuple[int, Tensor, float]]:
        """codes (T, K) → for each requested depth: its index, sums (F, T), and the total that divides them into scores.

        ``scratch``: a thread's buffers, reused from tile to tile; empty at first.
        """
        running: Tensor | None = None
        for (low, high, places), right in zip(self.steps, self.right, strict=True):
            left = self._decoded(codes[:, low:high], low, high, scratch).T  # ((high - low) · c, T)
            running = product(right, left) if running is None else added_product(running, right, left)
            for place in places:
                yield place, running, self.totals[high - 1]

    def _decoded(self, codes: NDArray[np.integer] | Tensor, low: int, high: int, scratch: dict[int, Tensor]) -> Tensor:
        _, size, width = self.table.shape
        if self.device.type == "cpu" and has_compiler() and isinstance(codes, np.ndarray) and codes.dtype == np.uint16:
            from rqae.searching.tiles import decode

            out = _reused(scratch, high - low, (len(codes), (high - low) * width), self.table)
            _check_codes(0, decode(codes, self.table[low:high].numpy(), out.numpy()), size)
            return out
        if isinstance(codes, np.ndarray):
            codes = torch.from_numpy(codes.astype(np.int64))
        indices = codes.to(self.device, torch.int64)
        if indices.numel():
            _check_codes(int(indices.min()), int(indices.max()), size)
        return self.table[torch.arange(low, high, device=self.device), indices].flatten(1)


def _reused(scratch: dict[int, Tensor], name: int, shape: tuple[int, int], like: Tensor) -> Tensor:
    """A scratch tensor of this shape, reused between tiles: allocating it costs more than the work done in it."""
    found = scratch.get(name)
    if found is None or found.shape != shape:
        found = scratch[name] = like.new_empty(shape)
    return found


def _scores(sums: Tensor, total: float) -> Tensor:
    """Intensities: sums divided by the sum of layer weights, clamped because rounding may exceed ±1."""
    return (sums / total).clamp_(-1, 1)


def _check_codes(low: int, high: int, size: int) -> None:
    if low < 0 or high >= size:
        raise RqaeError(
            "RQAE codes",
            expected=f"0 to {size - 1}",
            seen=f"{low} to {high}",
            fix="use integer codes of this checkpoint",
        )


class _CompiledBest:
    """The best scores on a CPU, with numba."""

    def __init__(self, depths: int, features: int, top_k: int) -> None:
        room = 2 * top_k + 64
        self._k = top_k
        # every intensity is above -2; the compiled code assumes that there are no infinities
        self._floors = np.full((depths, features), -2, np.float32)
        self._counts = np.zeros((depths, features), np.int64)
        self._values = np.full((depths, features, room), -inf, np.float32)
        self._rows = np.full((depths, features, room), -1, np.int64)

    def take(self, depth: int, sums: Tensor, total: float, first: int, segments: NDArray[np.int64]) -> None:
        from rqae.searching.tiles import push

        kept = self._floors[depth], self._counts[depth], self._values[depth], self._rows[depth]
        push(sums.numpy(), np.float32(total), first, segments, *kept, self._k)

    def result(self) -> _Found:
        beyond = np.arange(self._values.shape[2]) >= self._counts[..., None]
        values, rows = np.where(beyond, np.float32(-inf), self._values), np.where(beyond, -1, self._rows)
        order = np.argsort(-values, axis=2, kind="stable")[..., : self._k]
        return np.take_along_axis(values, order, axis=2), np.take_along_axis(rows, order, axis=2)


class _KeyedBest:
    """The best scores on any device, in plain torch. Score and row are packed into one integer; the largest are kept."""

    def __init__(self, depths: int, features: int, top_k: int) -> None:
        self._k = top_k
        self._keys: list[Tensor | None] = [None] * depths

    def take(self, depth: int, sums: Tensor, total: float, first: int, segments: NDArray[np.int64]) -> None:
        scores = _scores(sums, total)
        rows = torch.arange(first, first + scores.shape[1], device=scores.device)
        keys = _keys(scores, rows)
        if len(segments):
            lengths = torch.from_numpy(np.diff(segments)).to(scores.device)
            owner = torch.repeat_interleave(torch.arange(len(lengths), device=scores.device), lengths)
            most = keys.new_full((len(keys), len(lengths)), torch.iinfo(torch.int64).min)
            keys = most.scatter_reduce_(1, owner.expand_as(keys), keys, "amax")
        kept = self._keys[depth]
        keys = keys if kept is None else torch.cat([kept, keys], dim=1)
        self._keys[depth] = keys.topk(min(self._k, keys.shape[1]), dim=1, sorted=False).values

    def result(self) -> _Found:
        pairs = [
            _scores_and_rows(keys.sort(dim=1, descending=True).values, self._k)
            for keys in self._keys
            if keys is not None
        ]
        return np.stack([scores for scores, _ in pairs]), np.stack([rows for _, rows in pairs])


_ROWS = (1 << 32) - 1


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """Integers that sort by score, then by earlier row: floats sort like integers once negative ones have bits flipped."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    return (ordered << 32) | (_ROWS - rows)


def _scores_and_rows(keys: Tensor, top_k: int) -> _Found:
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32).cpu().numpy()
    rows = (_ROWS - (keys & _ROWS)).cpu().numpy()
    missing = ((0, 0), (0, top_k - keys.shape[1]))
    return np.pad(scores, missing, constant_values=-inf), np.pad(rows, missing, constant_values=-1)


def _merge(parts: Sequence[_Found], depths: int, features: int, top_k: int) -> _Found:
    """The best over several consecutive ranges of the corpus, given in order."""
    if not parts:
        shape = depths, features, top_k
        return np.full(shape, -inf, np.float32), np.full(shape, -1, np.int64)
    scores = np.concatenate([part for part, _ in parts], axis=2)
    rows = np.concatenate([part for _, part in parts], axis=2)
    order = np.argsort(-scores, axis=2, kind="stable")[..., :top_k]
    return np.take_along_axis(scores, order, axis=2), np.take_along_axis(rows, order, axis=2)


def _segments(contexts: NDArray[np.integer]) -> NDArray[np.int64]:
    """The start of each run of equal numbers, and the end of the last run."""
    return np.concatenate([[0], np.flatnonzero(np.diff(contexts)) + 1, [len(contexts)]]).astype(np.int64)


def _bounds(count: int, size: int, contexts: NDArray[np.integer] | None) -> list[tuple[int, int]]:
    """Start and end of tiles of about ``size`` tokens; with ``contexts``, no tile ends inside a context."""
    if contexts is None:
        edges = [*range(0, count, size), count]
    else:
        starts = _segments(contexts) if count else np.zeros(1, np.int64)
        wanted = np.arange(0, count, size)
        edges = sorted({*starts[np.searchsorted(starts, wanted)].tolist(), count})
    return [(low, high) for low, high in pairwise(edges) if low < high]


def _checked(
    model: RQAE, codes: NDArray[np.integer] | Tensor, features: Tensor, depths: Sequence[int], top_k: int
) -> int:
    """Check the arguments and return the deepest depth. The codes are checked later, when they are read."""
    limit = min(codes.shape[1], features.shape[1], model.config.num_quantizers)
    if not depths or not all(0 < depth <= limit for depth in depths):
        raise RqaeError(
            "search depths",
            expected=f"1 to {limit}",
            seen=str(list(depths)),
            fix="encode deeper, or use smaller depths",
        )
    if top_k < 1:
        raise RqaeError("top_k", expected="at least 1", seen=str(top_k), fix="raise it")
    if len(codes) > _ROWS:
        raise RqaeError("codes", expected=f"at most {_ROWS} tokens", seen=str(len(codes)), fix="search in parts")
    return max(depths)
