"""Cuts a corpus into a fixed grid of windows, and divides its documents into two pools.

Positives and negatives come from the same cells of the grid, so the position of a window carries no information about its
label. Knows tokens and documents; knows nothing of features. Reads the corpus in blocks; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import CorpusError
from evalkit.records import Pool, TokenBatch
from evalkit.seeds import derive, hash_priorities

__all__ = ["POOLS", "Grid", "GridCorpus", "build_grid"]

POOLS: tuple[Pool, Pool] = ("explain", "score")
_BLOCK = 1024  # contexts read at a time


class GridCorpus(Protocol):
    """The part of a corpus that the grid uses."""

    documents: NDArray[np.int64]

    @property
    def n_contexts(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    def batch(self, rows: NDArray[np.int64]) -> TokenBatch: ...


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Every usable window, in order of its id. All arrays are (window,).

    ``ids`` = context x cells per context + cell; ``starts`` is the first position inside the context; ``pools`` is 0 for
    the explain pool and 1 for the score pool. Usable: no masked token inside, and neither the window nor its whole context
    repeats an earlier one.
    """

    ids: NDArray[np.int64]
    contexts: NDArray[np.int64]
    starts: NDArray[np.int64]
    documents: NDArray[np.int64]
    pools: NDArray[np.uint8]
    window_length: int
    context_length: int
    offsets: NDArray[np.int64]  # (context,) where each context's first cell starts
    context_pools: NDArray[np.uint8]  # (context,) as ``pools``, usable or not
    n_duplicates: int

    def __len__(self) -> int:
        return len(self.ids)

    def window_of(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row into this grid (-1 outside every usable window) and position inside it.

        ``tokens``: flat token numbers, context x context length + position.
        """
        contexts, positions = np.divmod(tokens, self.context_length)
        relative = positions - self.offsets[contexts]
        cells = relative // self.window_length
        candidates = contexts * self._cells + cells
        rows = np.searchsorted(self.ids, candidates)
        rows = np.minimum(rows, len(self.ids) - 1)
        inside = (relative >= 0) & (self.ids[rows] == candidates)
        return np.where(inside, rows, -1), relative % self.window_length

    @property
    def _cells(self) -> int:
        return self.context_length // self.window_length


def _pools_of(hashes: NDArray[np.uint64], documents: NDArray[np.int64], seed: int) -> NDArray[np.uint8]:
    """The pool of each context, 0 (explain) or 1 (score): that of its document, by a hash of the document's first context.

    Each pool gets half of the documents, on average; copies of a document are in the same pool.
    """
    _, first, inverse = np.unique(documents, return_index=True, return_inverse=True)
    drawn = hash_priorities(derive(seed, "pools"), hashes[first]) >> np.uint64(63)
    return drawn.astype(np.uint8)[inverse]


def _context_hashes(corpus: GridCorpus) -> NDArray[np.uint64]:
    """One hash of the tokens of every context."""
    hashes = np.zeros(corpus.n_contexts, dtype=np.uint64)
    for first in range(0, corpus.n_contexts, _BLOCK):
        batch = corpus.batch(np.arange(first, min(first + _BLOCK, corpus.n_contexts)))
        hashes[batch.contexts] = _text_hash(batch.token_ids)
    return hashes


def build_grid(corpus: GridCorpus, *, window_length: int, skip_first: int, seed: int) -> Grid:
    """Build the grid of a corpus. Raises CorpusError if it has no usable window."""
    length = corpus.context_length
    cells = length // window_length
    rows = np.arange(corpus.n_contexts)
    room = length - skip_first - window_length
    if room < 0:
        raise CorpusError(
            "corpus",
            expected=f"contexts of at least {window_length + skip_first} tokens",
            seen=f"contexts of {length}",
            fix="use a longer --context-length or a shorter --window-length",
        )
    slack = min(window_length, room + 1)
    offsets = skip_first + (hash_priorities(derive(seed, "grid"), rows) % np.uint64(slack)).astype(np.int64)
    starts = offsets[:, None] + window_length * np.arange(cells)  # (context, cell)
    fits = starts + window_length <= length
    hashes = np.zeros(starts.shape, dtype=np.uint64)
    clean = np.zeros(starts.shape, dtype=bool)
    for first in range(0, corpus.n_contexts, _BLOCK):
        block = rows[first : first + _BLOCK]
        batch = corpus.batch(block)
        columns = np.minimum(starts[block][..., None] + np.arange(window_length), length - 1)  # (context, cell, pos)
        picked = np.arange(len(block))[:, None, None], columns
        clean[block] = batch.valid[picked].all(-1)
        hashes[block] = _text_hash(batch.token_ids[picked])
    context_hashes = _context_hashes(corpus)
    repeated = np.ones(corpus.n_contexts, dtype=bool)
    repeated[np.unique(context_hashes, return_index=True)[1]] = False
    usable = (fits & clean & ~repeated[:, None]).ravel()
    ids = np.flatnonzero(usable)
    _, first_of = np.unique(hashes.ravel()[ids], return_index=True)
    kept = np.sort(ids[first_of])
    if not len(kept):
        raise CorpusError(
            "corpus",
            expected=f"at least one window of {window_length} unmasked tokens",
            seen=f"none in {corpus.n_contexts} contexts",
            fix="use longer documents or a shorter --window-length",
        )
    contexts = kept // cells
    by_context = _pools_of(context_hashes, corpus.documents, seed)
    return Grid(
        ids=kept,
        contexts=contexts,
        starts=starts.ravel()[kept],
        documents=corpus.documents[contexts],
        pools=by_context[contexts],
        window_length=window_length,
        context_length=length,
        offsets=offsets,
        context_pools=by_context,
        n_duplicates=int((fits & clean).sum()) - len(kept),
    )


def _text_hash(tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One 64-bit hash per row of the last axis; order matters."""
    value = np.full(tokens.shape[:-1], 0x243F6A8885A308D3, dtype=np.uint64)
    for column in np.moveaxis(tokens, -1, 0):
        value = hash_priorities(0x13198A2E03707344, value ^ column.astype(np.uint64))
    return value
