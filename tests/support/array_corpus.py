"""A corpus of token arrays in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evalkit.records import TokenBatch


@dataclass
class ArrayCorpus:
    """A corpus in memory: tokens (N, T), one document per ``per_document`` contexts; token 0 is special."""

    tokens: NDArray[np.int64]
    per_document: int = 3
    skip_first: int = 1

    @property
    def documents(self) -> NDArray[np.int64]:
        return np.arange(len(self.tokens)) // self.per_document

    @property
    def n_contexts(self) -> int:
        return len(self.tokens)

    @property
    def context_length(self) -> int:
        return self.tokens.shape[1]

    def batch(self, rows: NDArray[np.int64]) -> TokenBatch:
        ids = self.tokens[rows]
        valid = (ids != 0) & (np.arange(ids.shape[1]) >= self.skip_first)
        return TokenBatch(ids, valid, np.asarray(rows, dtype=np.int64))


def random_corpus(n: int = 200, length: int = 64, seed: int = 0, low: int = 1) -> ArrayCorpus:
    return ArrayCorpus(np.random.default_rng(seed).integers(low, 5000, (n, length)))
