"""The inner loops of search on a CPU as machine code: decode a tile of codes, and keep the best of its scores.

Imports numba, so nothing imports this file before it is needed. Knows nothing of models and files; ``rqae.searching`` says
what the numbers mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rqae.compiled import compiled

__all__ = ["decode", "push"]

_LINE = 32  # codes of two bytes in a cache line; so many codebooks stay in the second cache meanwhile


def decode(codes: Any, table: Any, out: Any) -> int:
    """codes (T, n) uint16, table (n, K, c): out (T, n · c) gets the table's row of each code. Returns the largest code.

    One beyond the table is read as its last. Arrays are float32 and ``table`` and ``out`` contiguous.
    """
    count, size, width = table.shape
    if width == 4:  # sixteen bytes, copied as one number
        return int(_look_up(codes, table.view(np.complex128).reshape(-1), out.view(np.complex128), size))
    return int(_look_up_rows(codes, table.reshape(count * size, width), out, size))


@compiled
def _look_up(codes: Any, table: Any, out: Any, size: int) -> Any:
    last, largest = np.uint32(size - 1), np.uint32(0)
    for start in range(0, codes.shape[1], _LINE):
        end = min(start + _LINE, codes.shape[1])
        for token in range(codes.shape[0]):
            mine, row = codes[token], out[token]
            for quantizer in range(start, end):
                code = np.uint32(mine[quantizer])
                largest = max(largest, code)
                row[quantizer] = table[quantizer * size + min(code, last)]
    return largest


@compiled
def _look_up_rows(codes: Any, table: Any, out: Any, size: int) -> Any:
    width, last, largest = table.shape[1], np.uint32(size - 1), np.uint32(0)
    for start in range(0, codes.shape[1], _LINE):
        end = min(start + _LINE, codes.shape[1])
        for token in range(codes.shape[0]):
            for quantizer in range(start, end):
                code = np.uint32(codes[token, quantizer])
                largest = max(largest, code)
                place = quantizer * size + min(code, last)
                for axis in range(width):
                    out[token, quantizer * width + axis] = table[place, axis]
    return largest


@compiled
def _cut(values: Any, rows: Any, k: int) -> None:
    """Sort by falling value; rows rise already, and a stable sort leaves them so among equals."""
    order = np.argsort(-values, kind="mergesort")
    sorted_values, sorted_rows = values[order], rows[order]
    values[:k], rows[:k] = sorted_values[:k], sorted_rows[:k]


@compiled
def push(scores: Any, first: int, segments: Any, floors: Any, counts: Any, values: Any, rows: Any, k: int) -> None:
    """Append what is above a feature's floor: scores (F, T) of rows ``first`` and on; floors, counts (F,), lists (F, room).

    A full list is cut to its ``k`` best, equal ones by row, and the last of these becomes the floor. ``segments`` (S + 1,)
    are the starts of stretches of which only the best token counts, first of equals; empty where every token does. Rows
    must come in rising order.
    """
    room = values.shape[1]
    for feature in range(scores.shape[0]):
        floor, count = floors[feature], counts[feature]
        stretches = max(len(segments) - 1, 0)
        steps = stretches if stretches else scores.shape[1]
        for step in range(steps):
            token = step
            if stretches:
                token = segments[step]
                for other in range(token + 1, segments[step + 1]):
                    if scores[feature, other] > scores[feature, token]:
                        token = other
            score = scores[feature, token]
            if score > floor:
                if count == room:
                    _cut(values[feature], rows[feature], k)
                    floor, count = values[feature, k - 1], k
                    if not score > floor:
                        continue
                values[feature, count], rows[feature, count] = score, first + token
                count += 1
        floors[feature], counts[feature] = floor, count
