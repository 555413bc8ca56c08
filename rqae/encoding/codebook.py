"""Codebooks: the grid of the published RQAE, its symmetries, and which indices have the same direction.

Reads and writes no files. Source: H. Kamath, Residual Quantization Autoencoders, 2024 ("round_fsq").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, product
from math import gcd

import numpy as np
import torch
from torch import Tensor

from rqae.config import RqaeConfig

__all__ = [
    "TIE",
    "SortedGrid",
    "canonical_indices",
    "choose_codes",
    "distinct_codes",
    "grid_codebook",
    "normalised",
    "sorted_patterns",
]

# Rounding may swap cosines that differ by less than this (relative): a few units in the last place of float32.
TIE = 4e-7


def grid_codebook(levels: int, dim: int, *, rounded: bool) -> Tensor:
    """All points of an evenly spaced grid on [-1, 1]^dim in ``itertools.product`` order, (levels**dim, dim) float32.

    ``rounded`` divides each point by its norm; the zero vector stays zero.
    """
    points = np.array(list(product(np.linspace(-1, 1, levels), repeat=dim)))
    if rounded:
        norms = np.linalg.norm(points, axis=-1, keepdims=True)
        points = points / np.where(norms == 0, 1.0, norms)
    return torch.from_numpy(points.astype(np.float32))


def normalised(codebook: Tensor) -> Tensor:
    """The code vectors divided by their norms; zero vectors stay zero."""
    norms = codebook.norm(dim=-1, keepdim=True)
    return codebook / torch.where(norms == 0, torch.ones_like(norms), norms)


def _grid_steps(levels: int) -> list[int]:
    """The grid's levels as integers with equal spacing around zero: -2..2 for 5 levels, -3, -1, 1, 3 for 4."""
    return (
        [2 * k - (levels - 1) for k in range(levels)] if levels % 2 == 0 else [k - levels // 2 for k in range(levels)]
    )


@cache
def _grid_canonical(levels: int, dim: int) -> tuple[int, ...]:
    first: dict[tuple[int, ...], int] = {}
    canonical = []
    for index, point in enumerate(product(_grid_steps(levels), repeat=dim)):
        divisor = gcd(*point) or 1
        canonical.append(first.setdefault(tuple(value // divisor for value in point), index))
    return tuple(canonical)


def canonical_indices(config: RqaeConfig) -> Tensor:
    """For each code index the lowest index of the same direction, (num_codes,) int64.

    Only "round_fsq" repeats directions: in the published codebook, 81 of 625 indices are duplicates or the zero vector.
    "fsq" codes of one direction differ in length, and learned codes are assumed to be distinct, so both map to themselves.
    """
    if config.quantization_method != "round_fsq":
        return torch.arange(config.num_codes)
    return torch.tensor(_grid_canonical(config.codebook_size, config.codebook_dim))


def distinct_codes(config: RqaeConfig) -> int:
    """The number of codes that can be assigned: 544 for the published codebook. The zero vector is never assigned."""
    canonical = canonical_indices(config)
    has_zero = config.quantization_method == "round_fsq" and config.codebook_size % 2 == 1 and config.codebook_size > 1
    return len(set(canonical.tolist())) - int(has_zero)


@cache
def sorted_patterns(levels: int, dim: int) -> tuple[tuple[int, ...], ...]:
    """The directions of the grid up to sign flips and permutations: descending non-negative integers with gcd 1.

    In the units of ``_grid_steps``. In 4 dimensions there are 10 patterns for 5 levels, 26 for 7 and 51 for 9.
    """
    magnitudes = sorted({abs(step) for step in _grid_steps(levels)}, reverse=True)
    patterns = {
        tuple(value // gcd(*point) for value in point)
        for point in combinations_with_replacement(magnitudes, dim)
        if any(point)
    }
    return tuple(sorted(patterns, reverse=True))


@dataclass(frozen=True, slots=True)
class SortedGrid:
    """Tables to search a normalised grid: sort |p|, find the best pattern, undo the sorting and the signs. All float32.

    patterns: (S, c), unit vectors with descending components.
    steps: (S, c), the same vectors in grid steps.
    places: (c,), the change in a code's index for one step along each axis.
    centre: the index of the zero vector.
    """

    patterns: Tensor
    steps: Tensor
    places: Tensor
    centre: float

    @staticmethod
    def serves(config: RqaeConfig) -> bool:
        """Whether the codebook has this symmetry and more than one level and dimension."""
        return config.quantization_method == "round_fsq" and config.codebook_size > 1 and config.codebook_dim > 1

    @classmethod
    def of(cls, config: RqaeConfig, device: torch.device) -> SortedGrid:
        """The tables of a codebook for which ``serves`` is true."""
        levels, dim = config.codebook_size, config.codebook_dim
        steps = torch.tensor(sorted_patterns(levels, dim), dtype=torch.float64)
        places = torch.tensor([float(levels ** (dim - 1 - axis)) for axis in range(dim)])
        return cls(
            (steps / steps.norm(dim=-1, keepdim=True)).to(device, torch.float32),
            (steps if levels % 2 else steps / 2).to(device, torch.float32),  # even grids step by two
            places.to(device),
            (levels**dim - 1) / 2,
        )


def choose_codes(p: Tensor, codebook: Tensor, canonical: Tensor) -> Tensor:
    """The code with the largest cosine to each row (largest dot product if the codes are not normalised).

    p (N, c), codebook (K, c), canonical (K,) → (N,) int64. Ties, and p = 0, go to the lowest index.
    """
    norms = p.norm(dim=-1, keepdim=True)
    directions = p / torch.where(norms == 0, torch.ones_like(norms), norms)
    return canonical[(directions @ codebook.T).argmax(dim=-1)]  # argmax takes the first of equals
