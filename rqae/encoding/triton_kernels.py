"""The Triton program that computes the codes of a block of quantizers for a tile of tokens.

Imports Triton, so it is imported on first use only; ``rqae.encoding.kernels`` launches the program and describes the
arguments. All products are in float32, never in TF32.
"""

# Triton code only looks like Python: every name below is a tile, a pointer or a number on the GPU.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["solve_tile"]


@triton.jit(
    do_not_specialize=["low", "high", "tokens", "p_stride", "codes_stride", "vectors_stride", "diagonal_stride"]
)
def solve_tile(
    p, codes, vectors, diagonal, patterns, steps, places, canonical, book,
    low, high, tokens, p_stride, codes_stride, vectors_stride, diagonal_stride, pattern_count, code_count, centre, tie,
    C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write codes and vectors of quantizers low..high-1, one after the other, for TILE tokens with one thread each.

    A token's earlier vectors of the block are read back from memory, because Triton cannot index registers.
    """
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = token < tokens
    p += token
    codes += token
    vectors += token
    p_stride = p_stride.to(tl.int64)
    codes_stride = codes_stride.to(tl.int64)
    vectors_stride = vectors_stride.to(tl.int64)
    diagonal_stride = diagonal_stride.to(tl.int64)
    diagonal += low * C * diagonal_stride
    for quantizer in range(low, high):
        here = (quantizer - low) * C
        mine = _load_rows(p + here * p_stride, p_stride, inside, C)
        for earlier in range(low, quantizer):
            chosen = _load_rows(vectors + earlier * C * vectors_stride, vectors_stride, inside, C)
            factors = diagonal + here * diagonal_stride + (earlier - low) * C
            mine = _subtract(mine, factors, diagonal_stride, chosen, C)
        index, clear = _match(mine, patterns, steps, places, pattern_count, centre, tie, C)
        unclear = inside & (clear == 0)
        if tl.max(unclear.to(tl.int32), axis=0) > 0:
            index = tl.where(unclear, _literal(mine, book, code_count, C), index)
        code = tl.load(canonical + index)
        tl.store(codes + quantizer * codes_stride, code, mask=inside)
        for axis in tl.static_range(C):
            value = tl.load(book + code * C + axis)
            tl.store(vectors + (quantizer * C + axis) * vectors_stride, value, mask=inside)
        tl.debug_barrier()  # the next quantizer reads these vectors


@triton.jit
def _load_rows(rows, stride, inside, C: tl.constexpr):
    """C rows of a matrix whose columns are tokens, as a tuple of tiles."""
    values = ()
    for axis in tl.static_range(C):
        values += (tl.load(rows + axis * stride, mask=inside, other=0.0),)
    return values


@triton.jit
def _subtract(target, factors, stride, vector, C: tl.constexpr):
    """target - factors @ vector; the factors (C, C) are the same for every token."""
    rest = ()
    for row in tl.static_range(C):
        product = tl.load(factors + row * stride) * vector[0]
        for axis in tl.static_range(1, C):
            product += tl.load(factors + row * stride + axis) * vector[axis]
        rest += (target[row] - product,)
    return rest


@triton.jit
def _match(p, patterns, steps, places, count, centre, tie, C: tl.constexpr):
    """The code index of the nearest sorted pattern, and whether no other pattern ties with it up to rounding."""
    magnitude = ()
    place = ()
    for axis in tl.static_range(C):
        value = tl.load(places + axis)
        magnitude += (tl.abs(p[axis]),)
        place += (tl.where(p[axis] < 0, -value, value),)
    for turn in tl.static_range(C):  # odd-even transposition sort: largest first; places are permuted alike
        for axis in tl.static_range(turn % 2, C - 1, 2):
            swap = magnitude[axis + 1] > magnitude[axis]
            magnitude = _swapped(magnitude, swap, axis)
            place = _swapped(place, swap, axis)
    clear = magnitude[C - 1] > 0
    for axis in tl.static_range(C - 1):
        clear = clear & (magnitude[axis] != magnitude[axis + 1])
    best = tl.full(p[0].shape, -1.0, tl.float32)
    second = best
    nearest = tl.zeros(p[0].shape, tl.int32)
    for pattern in range(count):
        cosine = tl.load(patterns + pattern * C) * magnitude[0]
        for axis in tl.static_range(1, C):
            cosine += tl.load(patterns + pattern * C + axis) * magnitude[axis]
        better = cosine > best
        second = tl.maximum(second, tl.where(better, best, cosine))
        nearest = tl.where(better, pattern, nearest)
        best = tl.where(better, cosine, best)
    offset = tl.load(steps + nearest * C) * place[0]
    for axis in tl.static_range(1, C):
        offset += tl.load(steps + nearest * C + axis) * place[axis]
    return (offset + centre).to(tl.int32), clear & (second < best * (1 - tie))


@triton.jit
def _swapped(values, swap, axis: tl.constexpr):
    """The tuple with two neighbours exchanged where ``swap`` holds."""
    left, right = values[axis], values[axis + 1]
    exchanged = (tl.where(swap, right, left), tl.where(swap, left, right))
    return values[:axis] + exchanged + values[axis + 2 :]


@triton.jit
def _literal(p, book, count, C: tl.constexpr):
    """The first code with the largest cosine, as in ``rqae.literal``."""
    square = p[0] * p[0]
    for axis in tl.static_range(1, C):
        square += p[axis] * p[axis]
    norm = tl.where(square > 0, tl.sqrt_rn(square), 1.0)
    direction = ()
    for axis in tl.static_range(C):
        direction += (tl.div_rn(p[axis], norm),)
    most = tl.full(p[0].shape, float("-inf"), tl.float32)
    found = tl.zeros(p[0].shape, tl.int32)
    for code in range(count):
        cosine = tl.load(book + code * C) * direction[0]
        for axis in tl.static_range(1, C):
            cosine += tl.load(book + code * C + axis) * direction[axis]
        found = tl.where(cosine > most, code, found)
        most = tl.maximum(cosine, most)
    return found
