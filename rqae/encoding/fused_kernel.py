"""Compiled loops that choose the codes of a block of quantizers and subtract them within the block.

Every inner loop runs over tokens, which are adjacent in memory, so that the compiler vectorises it. The search of a
normalised grid uses its symmetry: sort |p|, compare with the few sorted patterns, undo the sorting and the signs. If two
patterns tie up to rounding, the rule of ``rqae.literal`` decides. Imports numba, so it is imported on first use only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rqae.encoding.compiled import compiled

__all__ = ["solve_block"]


@compiled
def _sort(p: Any, place: Any, magnitudes: Any, places: Any) -> None:
    """Write |p| in descending order per column, and the signed place values of its components in the same order."""
    width, count = p.shape
    for axis in range(width):
        for row in range(count):
            value = p[axis, row]
            magnitudes[axis, row] = abs(value)
            places[axis, row] = -place[axis] if value < 0 else place[axis]
    for turn in range(width):  # odd-even transposition sort, which needs no branches
        for axis in range(turn % 2, width - 1, 2):
            for row in range(count):
                left, right = magnitudes[axis, row], magnitudes[axis + 1, row]
                left_place, right_place = places[axis, row], places[axis + 1, row]
                swap = right > left
                magnitudes[axis, row] = right if swap else left
                magnitudes[axis + 1, row] = left if swap else right
                places[axis, row] = right_place if swap else left_place
                places[axis + 1, row] = left_place if swap else right_place


@compiled
def _match(
    magnitudes: Any, places: Any, patterns: Any, steps: Any, centre: Any, tie: Any, indices: Any, decided: Any, scratch: Any
) -> None:  # fmt: skip
    """Write the code index of the nearest pattern per column, and whether no other pattern ties with it up to rounding."""
    width, count = magnitudes.shape
    best, second, offset, cosine, candidate = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    for row in range(count):
        best[row], second[row], offset[row] = np.float32(-1), np.float32(-1), np.float32(0)
    for pattern in range(patterns.shape[0]):
        for row in range(count):
            cosine[row] = patterns[pattern, 0] * magnitudes[0, row]
            candidate[row] = steps[pattern, 0] * places[0, row]
        for axis in range(1, width):
            for row in range(count):
                cosine[row] += patterns[pattern, axis] * magnitudes[axis, row]
                candidate[row] += steps[pattern, axis] * places[axis, row]
        for row in range(count):
            better = cosine[row] > best[row]
            loser = best[row] if better else cosine[row]
            second[row] = loser if loser > second[row] else second[row]
            offset[row] = candidate[row] if better else offset[row]
            best[row] = cosine[row] if better else best[row]
    for row in range(count):
        indices[row] = np.int32(offset[row] + centre)
        clear = (second[row] < best[row] * (np.float32(1) - tie)) & (magnitudes[width - 1, row] > 0)
        decided[row] = np.int32(1) if clear else np.int32(0)
    for axis in range(width - 1):
        for row in range(count):
            decided[row] = np.int32(0) if magnitudes[axis, row] == magnitudes[axis + 1, row] else decided[row]


@compiled
def _subtract(target: Any, factors: Any, vectors: Any) -> None:
    """target -= factors @ vectors, for one row of p. The usual four dimensions take a single pass."""
    width, count = vectors.shape
    if width == 4:
        a, b, c, d = factors[0], factors[1], factors[2], factors[3]
        for row in range(count):
            target[row] -= a * vectors[0, row] + b * vectors[1, row] + c * vectors[2, row] + d * vectors[3, row]
        return
    for axis in range(width):
        for row in range(count):
            target[row] -= factors[axis] * vectors[axis, row]


@compiled
def _literal(p: Any, row: int, book: Any) -> int:
    """The first code with the largest cosine to one column of p, as in ``rqae.literal``."""
    width, count = book.shape
    norm = np.float32(0)
    for axis in range(width):
        norm += p[axis, row] * p[axis, row]
    norm = np.float32(np.sqrt(norm)) if norm > 0 else np.float32(1)
    found, most = 0, np.float32(-2)
    for code in range(count):
        cosine = np.float32(0)
        for axis in range(width):
            cosine += p[axis, row] / norm * book[axis, code]
        if cosine > most:
            found, most = code, cosine
    return found


@compiled
def solve_block(
    p: Any, codes: Any, vectors: Any, low: int, high: int, diagonal: Any, patterns: Any, steps: Any, place: Any,
    centre: Any, canonical: Any, book: Any, tie: Any,
) -> None:  # fmt: skip
    """Write codes and vectors, and update p, for quantizers low..high-1 of a chunk; see ``fused.FusedGridBlock``."""
    width, count = book.shape[0], p.shape[1]
    magnitudes = np.empty((width, count), np.float32)
    places = np.empty((width, count), np.float32)
    indices = np.empty(count, np.int32)
    decided = np.empty(count, np.int32)
    scratch = np.empty((5, count), np.float32)
    for quantizer in range(low, high):
        first, here = width * quantizer, width * (quantizer - low)
        mine = p[here : here + width]
        _sort(mine, place, magnitudes, places)
        _match(magnitudes, places, patterns, steps, centre, tie, indices, decided, scratch)
        for row in range(count):
            if decided[row] == 0:
                indices[row] = _literal(mine, row, book)
        for row in range(count):
            code = canonical[indices[row]]
            codes[quantizer, row] = code
            for axis in range(width):
                vectors[first + axis, row] = book[axis, code]
        for later in range(here + width, width * (high - low)):
            factors = diagonal[width * low + later, here : here + width]
            _subtract(p[later], factors, vectors[first : first + width])
