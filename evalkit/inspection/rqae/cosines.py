"""Cosines between decoded codes: between pairs of the vectors W_out,i C_c that an RQAE adds up.

A cosine needs only the products W_out,iᵀ W_out,j of the small decoders, so no vector of the model's width is formed. Covers
all pairs if there are few, otherwise a seeded sample. Knows only the RQAE's weights; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, lgamma, pi, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from evalkit.errors import BadConfig
from evalkit.seeds import derive
from rqae import RQAE

__all__ = ["BINS", "SMALL", "CosineShare", "cosine_density", "decoded_cosines"]

BINS = 200  # bins of the histogram, from -1 to 1
SMALL = 0.2  # cosines below this, in absolute value, count as small
_CHUNK = 1 << 17  # pairs computed at the same time
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CosineShare:
    """Cosines of one kind of pairs.

    ``pairs``: total number of pairs.
    ``sampled``: number of pairs measured; 0 if the values come from a formula.
    ``small``: share of pairs with |cos| < SMALL.
    ``mean``: mean of |cos|.
    """

    kind: str
    pairs: int
    sampled: int
    small: float
    mean: float


def decoded_cosines(model: RQAE, n_pairs: int, seed: int) -> tuple[list[CosineShare], dict[str, list[float]]]:
    """Cosines of pairs of different decoded codes (i, c).

    Returns one row for pairs within a quantizer, one for pairs across quantizers, one for all pairs, in which the other two
    are weighted by their numbers of pairs, and one for random directions of the model's width, in closed form. Also
    returns the histogram of each kind, as densities over BINS bins. Codes that decode to zero have no direction and are
    left out.

    ``n_pairs``: maximum number of pairs of each kind; if there are more, this many are drawn uniformly with replacement.

    Raises BadConfig if ``n_pairs`` is below 1.
    """
    if n_pairs < 1:
        raise BadConfig("pairs", expected="at least 1", seen=str(n_pairs), fix="sample at least one pair")
    table = _Decoded(model)
    rows, histograms = [], {}
    for kind, total, pick in (
        ("within a quantizer", table.n_within, table.within),
        ("across quantizers", table.n_across, table.across),
    ):
        if not total:
            continue
        counts, absolute, below = np.zeros(BINS, np.int64), 0.0, 0
        for pairs in _draw(total, n_pairs, derive(seed, "cosines", kind)):
            cosines = pick(pairs)
            counts += np.histogram(cosines, BINS, (-1.0, 1.0))[0]
            below += int((np.abs(cosines) < SMALL).sum())
            absolute += float(np.abs(cosines).sum())
        sampled = max(int(counts.sum()), 1)
        rows.append(CosineShare(kind, total, sampled, below / sampled, absolute / sampled))
        histograms[kind] = (counts / sampled * BINS / 2).tolist()
    whole = sum(row.pairs for row in rows)
    if whole:
        small = sum(row.small * row.pairs for row in rows) / whole
        mean = sum(row.mean * row.pairs for row in rows) / whole
        rows.append(CosineShare("all", whole, sum(row.sampled for row in rows), small, mean))
    if model.config.dim > 1:
        rows.append(_random_directions(model.config.dim))
    return rows, histograms


def _random_directions(dim: int) -> CosineShare:
    """The row for two independent uniform directions, for which cos² is Beta(1/2, (dim - 1)/2)."""
    mean = exp(lgamma(dim / 2) - lgamma((dim + 1) / 2)) / sqrt(pi)
    return CosineShare("random directions", 0, 0, float(beta.cdf(SMALL**2, 0.5, (dim - 1) / 2)), mean)


def cosine_density(x: Floats, dim: int) -> Floats:
    """The density at ``x`` of the cosine of two random directions in ``dim`` dimensions (3 or more)."""
    scale = exp(lgamma(dim / 2) - lgamma((dim - 1) / 2)) / sqrt(pi)
    return np.asarray(scale * (1 - x**2) ** ((dim - 3) / 2), np.float64)


def _draw(total: int, wanted: int, seed: int) -> Iterator[Ints]:
    """The numbers of the pairs to measure, in chunks: all pairs, or a uniform sample."""
    generator = np.random.default_rng(seed)
    count = min(total, wanted)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        yield np.arange(start, start + size) if total <= wanted else generator.integers(0, total, size)


class _Decoded:
    """The decoded codes of an RQAE, represented by their inner products; i is a quantizer, c a usable code."""

    def __init__(self, model: RQAE) -> None:
        count, width = model.config.num_quantizers, model.config.codebook_dim
        flat = model.w_out.double().cpu().permute(0, 2, 1).reshape(count * width, -1).numpy()
        self._gram = (flat @ flat.T).reshape(count, width, count, width).transpose(0, 2, 1, 3)  # (i, j, c, c)
        usable = np.unique(model.canonical.cpu().numpy())
        codes = model.codebook.double().cpu().numpy()[:, usable]  # (i, code, c)
        self._codes = codes[:, (codes != 0).any(axis=(0, 2))]
        own = self._gram[np.arange(count), np.arange(count)]
        self._norms = np.sqrt(np.maximum(np.einsum("imc,icd,imd->im", self._codes, own, self._codes), 0))
        self._size = self._codes.shape[1]
        self._pairs_of_codes = np.triu_indices(self._size, 1)
        self._pairs_of_quantizers = np.triu_indices(count, 1)
        self.n_within = count * len(self._pairs_of_codes[0])
        self.n_across = len(self._pairs_of_quantizers[0]) * self._size**2

    def within(self, pairs: Ints) -> Floats:
        """Cosines of pairs numbered 0 to ``n_within`` - 1."""
        quantizer, pair = np.divmod(pairs, len(self._pairs_of_codes[0]))
        left, right = (codes[pair] for codes in self._pairs_of_codes)
        return self._cosines(quantizer, quantizer, left, right)

    def across(self, pairs: Ints) -> Floats:
        """Cosines of pairs numbered 0 to ``n_across`` - 1."""
        pair, codes = np.divmod(pairs, self._size**2)
        first, second = (quantizers[pair] for quantizers in self._pairs_of_quantizers)
        return self._cosines(first, second, *np.divmod(codes, self._size))

    def _cosines(self, i: Ints, j: Ints, a: Ints, b: Ints) -> Floats:
        products = np.einsum("nc,ncd,nd->n", self._codes[i, a], self._gram[i, j], self._codes[j, b])
        lengths = self._norms[i, a] * self._norms[j, b]
        found: Floats = np.clip(products[lengths > 0] / lengths[lengths > 0], -1, 1)
        return found
