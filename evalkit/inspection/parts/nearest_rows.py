"""Finds the nearest neighbour by cosine of every row of a matrix, and gives the distribution for random rows.

Computes exact products in float32, tile by tile, so that a decoder on disk is never loaded whole. For a large matrix,
neighbours are searched only for a sample of rows, but among all rows; the sample is drawn by hash. Knows only matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betainc
from scipy.stats import beta
from torch import Tensor

from evalkit.protocols import Progress
from evalkit.seeds import derive, hash_priorities
from evalkit.util.progress import SILENT
from evalkit.util.tensor_files import Matrix, take

__all__ = ["ALL_UP_TO", "SAMPLE", "Neighbours", "nearest_rows", "random_nearest", "random_rank"]

ALL_UP_TO = 131_072  # with more rows, neighbours are searched for only SAMPLE of them
SAMPLE = 16_384
_QUERIES = 1 << 14  # rows whose neighbours are searched at the same time
_TILE = 1 << 11  # rows with which they are compared at the same time
_NONE = -2.0  # stands for "no neighbour"; lower than every cosine

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """Nearest neighbours of the rows of a matrix.

    ``rows``: (m,), ascending.
    ``nearest``: (m,), for each of ``rows``, the nearest other row of the matrix.
    ``cosines``: (m,), the cosine with that row.
    ``total``: number of rows of the matrix.
    ``zero``: number of zero rows; these have no direction and are neither in ``rows`` nor a neighbour.
    ``sampled``: whether ``rows`` is a sample.
    """

    rows: Ints
    nearest: Ints
    cosines: Floats
    total: int
    zero: int
    sampled: bool

    @property
    def in_degrees(self) -> Ints:
        """(total,), for each row of the matrix, how many of ``rows`` have it as their nearest neighbour."""
        found: Ints = np.bincount(self.nearest, minlength=self.total)
        return found


def nearest_rows(matrix: Matrix, seed: int = 0, progress: Progress = SILENT, device: str = "cpu") -> Neighbours:
    """The nearest neighbour by cosine of each row of ``matrix`` (n, d); of equally near rows, the first. Raises BadFile."""
    n = int(matrix.shape[0])
    sampled = n > ALL_UP_TO
    order = np.argsort(hash_priorities(derive(seed, "decoder rows"), np.arange(n)), kind="stable") if sampled else None
    rows = np.arange(n) if order is None else np.sort(order[:SAMPLE])
    task = progress.start("nearest decoder rows", len(rows), "latents")
    cosines, nearest = np.full(len(rows), _NONE), np.zeros(len(rows), np.int64)
    zero, count = np.zeros(len(rows), bool), 0
    for low in range(0, len(rows), _QUERIES):
        chosen = rows[low : low + _QUERIES]
        queries, none = _directions(matrix, chosen, device)
        zero[low : low + len(chosen)] = none.cpu().numpy()
        best, place, count = _search(matrix, chosen, queries, device)
        cosines[low : low + len(chosen)], nearest[low : low + len(chosen)] = best, place
        progress.advance(task, len(chosen))
    progress.finish(task)
    known = ~zero & (cosines > _NONE)
    return Neighbours(rows[known], nearest[known], np.clip(cosines[known], -1, 1), n, count, sampled)


def _search(matrix: Matrix, chosen: Ints, queries: Tensor, device: str) -> tuple[Floats, Ints, int]:
    """For each query the largest cosine with another row, that row, and the number of zero rows."""
    best = torch.full((len(chosen),), _NONE, device=device)
    place = torch.zeros(len(chosen), dtype=torch.int64, device=device)
    zeros = 0
    for low in range(0, int(matrix.shape[0]), _TILE):
        tile = slice(low, min(low + _TILE, int(matrix.shape[0])))
        others, none = _directions(matrix, tile, device)
        zeros += int(none.sum())
        products = queries @ others.T  # (query, tile)
        products[:, none] = _NONE
        same = np.flatnonzero((chosen >= tile.start) & (chosen < tile.stop))
        products[torch.from_numpy(same), torch.from_numpy(chosen[same] - low)] = _NONE
        value, where = products.max(dim=1)
        better = value > best
        best, place = torch.where(better, value, best), torch.where(better, where + low, place)
    return best.double().cpu().numpy(), place.cpu().numpy(), zeros


def _directions(matrix: Matrix, index: Ints | slice, device: str) -> tuple[Tensor, Tensor]:
    """The chosen rows scaled to length 1, and a mask of those that are zero."""
    rows = take(matrix, index, 0).to(device)
    lengths = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(lengths > 0, lengths, torch.ones_like(lengths)), lengths[:, 0] == 0


def random_nearest(edges: Floats, n: int, dim: int) -> Floats:
    """The density, in each bin of ``edges``, of a row's largest cosine with n - 1 random directions, for ``dim`` ≥ 2."""
    share = _below(dim)(edges) ** (n - 1)
    return np.diff(share) / np.diff(edges)


def random_rank(rank: int, queries: int, n: int, dim: int) -> float:
    """The nearest-neighbour cosine that, on average, ``rank`` of ``queries`` rows exceed, among n random directions."""
    share = max(0.0, 1 - rank / queries)
    if share == 0:
        return -1.0
    tail = -np.expm1(np.log(share) / (n - 1))  # for a single pair: 1 - F(t)
    if tail >= 0.5:
        return float(-np.sqrt(beta.isf(min(1.0, 2 * (1 - tail)), 0.5, (dim - 1) / 2)))
    return float(np.sqrt(beta.isf(2 * tail, 0.5, (dim - 1) / 2)))


def _below(dim: int) -> Callable[[Floats], Floats]:
    """The probability that the cosine of two random directions is below t: cos² is Beta(1/2, (dim - 1)/2)."""

    def share(t: Floats) -> Floats:
        inside = betainc(0.5, (dim - 1) / 2, np.clip(t, -1, 1) ** 2)
        found: Floats = (1 + np.sign(t) * inside) / 2
        return found

    return share
