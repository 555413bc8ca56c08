"""Compiled inner loops of the search on a CPU: decode a tile of codes, and keep its best scores.

Imports numba, so it is imported on first use only. ``rqae.searching.scan`` documents the quantities.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rqae.encoding.compiled import compiled

__all__ = ["decode", "push"]

_SLACK = np.float32(1e-6)  # relative tolerance that covers several rounding errors
_STRIDE = 32  # tokens tested together
# Quantizers decoded together: half a cache line of two-byte codes, and few enough codebooks for the L2 cache.
_LINE = 16


def decode(codes: Any, table: Any, out: Any) -> int:
    """codes (T, n) uint16, table (n, K, c): write the table's row of each code to out (T, n · c); return the largest code.

    If a code is outside the table, ``out`` is not changed. Arrays are float32 and ``table`` and ``out`` contiguous.
    """
    count, size, width = table.shape
    largest = int(codes.max()) if codes.size else 0
    if largest < size and width == 4:  # sixteen bytes, copied as one number
        _look_up(codes, table.view(np.complex128).reshape(-1), out.view(np.complex128), size)
    elif largest < size:
        _look_up_rows(codes, table.reshape(count * size, width), out, size)
    return largest


@compiled
def _look_up(codes: Any, table: Any, out: Any, size: int) -> None:
    for start in range(0, codes.shape[1], _LINE):
        end = min(start + _LINE, codes.shape[1])
        for token in range(codes.shape[0]):
            mine, row = codes[token], out[token]
            for quantizer in range(start, end):
                at = np.uint32(quantizer)  # unsigned, or numba adds a check for negative indices
                row[at] = table[at * np.uint32(size) + np.uint32(mine[at])]


@compiled
def _look_up_rows(codes: Any, table: Any, out: Any, size: int) -> None:
    width = table.shape[1]
    for start in range(0, codes.shape[1], _LINE):
        end = min(start + _LINE, codes.shape[1])
        for token in range(codes.shape[0]):
            for quantizer in range(start, end):
                place = quantizer * size + np.int64(codes[token, quantizer])
                for axis in range(width):
                    out[token, quantizer * width + axis] = table[place, axis]


@compiled
def _cut(values: Any, rows: Any, k: int, keys: Any) -> Any:
    """Keep the ``k`` best in their order (the earlier of equal ones); return the smallest kept. ``keys``: scratch space.

    The smallest is found by bisection over integers that sort like the floats, so that each step only counts values.
    """
    bits = values.view(np.int32)
    for at in range(len(values)):
        key = bits[at] if values[at] != 0 else np.int32(0)  # -0.0 counts as 0.0
        keys[at] = key ^ ((key >> 31) & np.int32(0x7FFFFFFF))
    low, high = np.int64(-0x3F800001), np.int64(0x3F800000)  # the keys of -1 and 1, between which all scores lie
    while low < high:
        middle = (low + high) >> 1
        pivot, above = np.int32(middle), np.int32(0)
        for at in range(len(values)):
            above += np.int32(1) if keys[at] > pivot else np.int32(0)
        if above >= k:
            low = middle + 1
        else:
            high = middle
    least, ties = np.int32(low), np.int64(k)
    for at in range(len(values)):
        ties -= np.int64(keys[at] > least)
    kept = np.int64(0)
    for at in range(len(values)):
        if kept < k:  # always written, and overwritten if not kept: avoids a branch
            tie = (keys[at] == least) & (ties > 0)
            keep = np.int64(keys[at] > least) | np.int64(tie)
            ties -= np.int64(tie)
            values[kept], rows[kept] = values[at], rows[at]
            kept += keep
    least_value = values[0]
    for at in range(1, k):
        least_value = min(least_value, values[at])
    return least_value


@compiled
def _any_above(sums: Any, limit: Any) -> Any:
    """Whether any sum is above the limit. Has no branches, so that it vectorises."""
    above = np.int32(0)
    for token in range(len(sums)):
        above += np.int32(1) if sums[token] > limit else np.int32(0)
    return above > 0


@compiled
def _limit(floor: Any, total: Any) -> Any:
    """A limit such that smaller sums cannot have a score above the floor. Slightly low, to allow for rounding."""
    limit = floor * total
    return limit - _SLACK * abs(limit)


@compiled
def _score(value: Any, total: Any) -> Any:
    return min(max(value / total, np.float32(-1)), np.float32(1))


@compiled
def push(
    sums: Any, total: Any, first: int, segments: Any, floors: Any, counts: Any, values: Any, rows: Any, k: int
) -> None:
    """Append the scores (sums (F, T) / ``total``) above each feature's floor to lists (F, room); rows start at ``first``.

    A full list is cut to its ``k`` best (the earlier of equal ones), and the smallest of these becomes the floor.
    ``segments`` (S + 1,): starts of contexts, of which only the best token (the first of equal ones) counts; empty if
    every token counts. Rows must come in ascending order.
    """
    room, tokens = values.shape[1], sums.shape[1]
    stretches = max(len(segments) - 1, 0)
    steps = stretches if stretches else (tokens + _STRIDE - 1) // _STRIDE
    keys = np.empty(room, np.int32)
    for feature in range(sums.shape[0]):
        floor, count, mine = floors[feature], counts[feature], sums[feature]
        for step in range(steps):
            start = segments[step] if stretches else step * _STRIDE
            end = segments[step + 1] if stretches else min(start + _STRIDE, tokens)
            if not _any_above(mine[start:end], _limit(floor, total)):
                continue
            if stretches:  # only the best token of this context
                for other in range(start + 1, end):
                    if _score(mine[other], total) > _score(mine[start], total):
                        start = other
                end = start + 1
            for token in range(start, end):
                score = _score(mine[token], total)
                if score > floor:
                    if count == room:
                        floor, count = _cut(values[feature], rows[feature], k, keys), k
                        if not score > floor:
                            continue
                    values[feature, count], rows[feature, count] = score, first + token
                    count += 1
        floors[feature], counts[feature] = floor, count
