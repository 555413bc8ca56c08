"""RQAE encoding in code space, solved like a block-triangular system: faster than ``rqae.literal``, with the same codes.

It uses three exact reformulations. (1) p_i = W_in,i x + b_in,i - Σ_{j<i} W_in,i (W_out,j C_{c_j} + b_out,j). So one matrix
product gives all p for r₁ = x, and each chosen code subtracts columns of G = W_in W_out; the residual of width d is never
formed. (2) The quantizers are halved recursively down to small blocks, and one product subtracts a finished half from the
half after it. ``rqae.encoding.fused`` or ``rqae.encoding.kernels`` solve the blocks if they support the codebook and
device. (3) A normalised grid is invariant under sign flips and permutations: sort |p|, compare with the few sorted
patterns, undo the sorting and the signs. If two patterns tie up to rounding, the rule of ``rqae.literal`` decides.

The codes of a row do not depend on the rest of the batch (beyond rounding in the matrix products). Reads and writes no
files. Source: H. Kamath, Residual Quantization Autoencoders, 2024, for the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from rqae.config import RqaeConfig
from rqae.encoding import fused, kernels
from rqae.encoding.codebook import TIE, SortedGrid, choose_codes
from rqae.encoding.products import added_product, product
from rqae.errors import RqaeError

__all__ = [
    "Block",
    "BlockedEncoder",
    "GridQuantiser",
    "Quantiser",
    "TableQuantiser",
    "one_thread_each",
    "quantiser_for",
]

Part = TypeVar("Part")
Result = TypeVar("Result")
# Tokens per chunk: small enough for the working set to stay in the CPU cache. A multiple of 128 keeps products bit-equal.
_CHUNK, _DEVICE_CHUNK = 512, 8192


class Quantiser(Protocol):
    """Chooses one code for each row of p."""

    def __call__(self, p: Tensor, quantizer: int) -> Tensor:
        """p (N, c) of one quantizer → codes (N,) int64."""


class TableQuantiser(Quantiser):
    """Compares p with every code; used for learned codebooks and grids that are not normalised."""

    def __init__(self, codebook: Tensor, canonical: Tensor) -> None:
        self._codebook, self._canonical = codebook, canonical

    def __call__(self, p: Tensor, quantizer: int) -> Tensor:
        return choose_codes(p, self._codebook[quantizer], self._canonical)


class GridQuantiser(Quantiser):
    """Uses the symmetry of the normalised grid: sorts |p| and compares with its few sorted patterns."""

    def __init__(self, config: RqaeConfig, codebook: Tensor, canonical: Tensor) -> None:
        self._codebook, self._canonical = codebook[0], canonical
        self._grid = SortedGrid.of(config, codebook.device)
        self._zero_is_a_level = config.codebook_size % 2 == 1

    def __call__(self, p: Tensor, quantizer: int) -> Tensor:
        magnitudes, order = p.abs().sort(dim=-1, descending=True)  # (N, c)
        cosines = self._grid.patterns @ magnitudes.T  # (S, N), each times |p|
        best, pattern = cosines.max(dim=0)
        signed_place = torch.copysign(self._grid.places, p).gather(1, order)
        index = (self._grid.steps.index_select(0, pattern) * signed_place).sum(dim=-1).add_(self._grid.centre)
        codes = self._canonical.index_select(0, index.long())
        close = cosines >= best * (1 - TIE)  # the best pattern, and patterns that tie with it up to rounding
        equal = magnitudes[:, 1:] == magnitudes[:, :-1]
        if int(torch.count_nonzero(close)) > len(p) or bool(equal.any()) or not self._zero_is_a_level:
            tied = (close.sum(dim=0) > 1) | equal.any(dim=-1) | (magnitudes[:, -1] == 0)
            codes[tied] = choose_codes(p[tied], self._codebook, self._canonical)
        return codes


def quantiser_for(config: RqaeConfig, codebook: Tensor, canonical: Tensor) -> Quantiser:
    """The fastest exact quantiser for a codebook (n_q, K, c)."""
    if SortedGrid.serves(config):
        return GridQuantiser(config, codebook, canonical)
    return TableQuantiser(codebook, canonical)


class Block(Protocol):
    """Solves one diagonal block: a few quantizers one after the other, for all tokens at once."""

    size: int  # largest number of quantizers that it can solve at once

    def solve(self, p: Tensor, codes: Tensor, vectors: Tensor, low: int, high: int) -> None:
        """Fix codes (n_q, N) int32 and vectors (m, N) of quantizers low..high-1 from their p ((high - low) · c, N)."""


class SingleBlock:
    """One quantizer in plain torch; works for every codebook and device."""

    size = 1

    def __init__(self, quantise: Quantiser, codebook: Tensor) -> None:
        self._quantise, self._codebook = quantise, codebook

    def solve(self, p: Tensor, codes: Tensor, vectors: Tensor, low: int, high: int) -> None:
        """See ``Block.solve``; here high = low + 1."""
        width = self._codebook.shape[-1]
        mine = slice(low * width, high * width)
        chosen = self._quantise(p.T.contiguous(), low)
        codes[low] = chosen
        vectors[mine] = self._codebook[low].index_select(0, chosen).T


@dataclass(frozen=True, slots=True)
class BlockedEncoder:
    """The precomputed matrices of one model. ``m`` below is n_q · c, the flat code dimension; tokens are columns."""

    weight: Tensor  # (m, d): weight @ xᵀ + bias gives every p for r₁ = x
    bias: Tensor  # (m, 1)
    below: dict[
        tuple[int, int], Tensor
    ]  # (low, middle): minus the part of G with which quantizers low..middle-1 act on the half after them
    width: int  # c
    block: Block

    @classmethod
    def build(
        cls,
        config: RqaeConfig,
        w_in: Tensor,
        b_in: Tensor,
        w_out: Tensor,
        b_out: Tensor,
        codebook: Tensor,
        canonical: Tensor,
    ) -> BlockedEncoder:
        """Precompute from the stacked layers: w_in (n_q, c, d), b_in (n_q, c), w_out (n_q, d, c), b_out (n_q, d)."""
        count, width, dim = w_in.shape
        weight = w_in.reshape(count * width, dim).contiguous()  # (m, d)
        before = torch.zeros_like(b_out)
        before[1:] = b_out[:-1].cumsum(dim=0)
        with full_precision():
            bias = b_in - torch.einsum("nd,ncd->nc", before, w_in)
            gram = weight @ w_out.transpose(1, 2).reshape(count * width, dim).T
        block: Block
        if kernels.is_available(config, weight.device):
            diagonal = diagonal_of(gram, kernels.TritonGridBlock.size * width)
            block = kernels.TritonGridBlock(config, codebook, canonical, diagonal)
        elif fused.is_available(config, weight.device):
            diagonal = diagonal_of(gram, fused.FusedGridBlock.size * width)
            block = fused.FusedGridBlock(config, codebook, canonical, diagonal)
        else:
            block = SingleBlock(quantiser_for(config, codebook, canonical), codebook)
        below = {
            (low, middle): -gram[middle * width : high * width, low * width : middle * width]
            for low, middle, high in _halvings(0, count, block.size)
        }
        return cls(weight, bias.reshape(-1, 1), below, width, block)

    def encode(self, x: Tensor, depth: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """x (N, d) of any floating type → codes (N, depth). ``dtype``: an integer type that can hold the codes.

        Raises RqaeError naming the first row that is not finite.
        """
        codes = torch.empty(len(x), depth, dtype=dtype, device=x.device)

        def keep(rows: slice, found: Tensor, vectors: Tensor) -> None:
            codes[rows] = found.T.to(dtype)

        self._each_chunk(x, depth, keep)
        return codes

    def encode_with_vectors(self, x: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Codes as from ``encode``, and their vectors concatenated, (N, depth · c) float32, as a view."""
        codes = torch.empty(len(x), depth, dtype=torch.int64, device=x.device)
        vectors = torch.empty(depth * self.width, len(x), device=x.device)

        def keep(rows: slice, found: Tensor, chosen: Tensor) -> None:
            codes[rows], vectors[:, rows] = found.T, chosen

        self._each_chunk(x, depth, keep)
        return codes, vectors.T

    def _each_chunk(self, x: Tensor, depth: int, keep: Callable[[slice, Tensor, Tensor], None]) -> None:
        """Encode x in chunks of tokens; call ``keep`` with each chunk's rows, codes and vectors.

        Codes are (depth, rows), vectors (depth · c, rows). On a CPU, the chunks are distributed over as many threads as
        torch uses; products in each thread are single-threaded, so that two thread pools do not compete.
        """
        end, on_cpu = depth * self.width, x.device.type == "cpu"
        size = _CHUNK if on_cpu else _DEVICE_CHUNK

        def work(start: int) -> None:
            rows = slice(start, min(start + size, len(x)))
            given = x[rows].to(self.weight)
            if len(given) == 1:  # with a single column, the product would sum in another order
                given = given.expand(2, -1)
            p = product(self.weight[:end], given.T).add_(self.bias[:end])  # (depth · c, rows)
            if not bool(p[: self.width].isfinite().all()):  # NaN and infinity in x propagate through the product
                _refuse(x[rows], start)
            codes, vectors = p.new_empty(depth, p.shape[1], dtype=torch.int32), torch.empty_like(p)
            self._solve(p, codes, vectors, 0, depth)
            count = rows.stop - rows.start
            keep(rows, codes[:, :count], vectors[:, :count])

        starts = range(0, len(x), size)
        if on_cpu:
            one_thread_each(work, starts)
            return
        with full_precision():
            for start in starts:
                work(start)

    def _solve(self, p: Tensor, codes: Tensor, vectors: Tensor, low: int, high: int) -> None:
        """Fix the codes of quantizers low..high-1 from p, which already has all quantizers before ``low`` subtracted."""
        if high - low <= self.block.size:
            self.block.solve(p, codes, vectors, low, high)
            return
        middle, width = _middle(low, high), self.width
        left = (middle - low) * width
        self._solve(p[:left], codes, vectors, low, middle)
        reach = self.below[low, middle][: (high - middle) * width]
        p = added_product(p[left:], reach, vectors[low * width : middle * width])
        self._solve(p, codes, vectors, middle, high)


def _middle(low: int, high: int) -> int:
    """Where to halve a range of quantizers: a power of two from its start, so that a smaller depth takes the same steps."""
    return low + (1 << ((high - low - 1).bit_length() - 1))


def _halvings(low: int, high: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Start, middle and end of each halving, down to ranges of at most ``size`` quantizers."""
    if high - low > size:
        middle = _middle(low, high)
        yield low, middle, high
        yield from _halvings(low, middle, size)
        yield from _halvings(middle, high, size)


def diagonal_of(gram: Tensor, size: int) -> Tensor:
    """The square blocks along the diagonal of (m, m), stacked: (m, size); a shorter last block is padded with zeros."""
    count = len(gram)
    diagonal = gram.new_zeros(count, size)
    for low in range(0, count, size):
        high = min(low + size, count)
        diagonal[low:high, : high - low] = gram[low:high, low:high]
    return diagonal


def _refuse(x: Tensor, start: int) -> None:
    """Raise RqaeError naming the first row of a chunk that cannot be encoded."""
    sound = x.isfinite().all(dim=-1)
    largest = x.float().abs().amax(dim=-1)
    row = int((~sound).nonzero()[0]) if not bool(sound.all()) else int(largest.argmax())
    raise RqaeError(
        f"RQAE input row {start + row}",
        expected="finite numbers",
        seen=f"numbers up to {float(largest[row]):.1e}" if bool(sound.all()) else "NaN or infinity",
        fix="drop that token, or compute the subject model in float32",
    )


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute matrix products in true float32 inside this context: TF32, if enabled, would change codes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def one_thread_each(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Run ``work`` on every part, on as many threads as torch uses; inside each, torch is single-threaded."""
    threads = min(torch.get_num_threads(), len(parts))
    if threads < 2:
        return [work(part) for part in parts]

    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()  # new threads do not inherit these

    def alone(part: Part) -> Result:
        torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(part)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(alone, parts))
    finally:
        torch.set_num_threads(before)
