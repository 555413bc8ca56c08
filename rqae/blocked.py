"""RQAE encoding in code space, solved like a block-triangular system: the same codes as ``rqae.literal``, faster.

Three exact rewrites. (1) p_i = W_in,i x + b_in,i - Σ_{j<i} W_in,i (W_out,j C_{c_j} + b_out,j), so one matrix product gives
all p for r₁ = x, and each chosen code subtracts columns of G = W_in W_out: the residual of width d is never formed.
(2) The quantizers are halved recursively, and a finished half is subtracted from its right neighbour by one product.
(3) A normalised grid is invariant under sign flips and permutations: sort |p|, compare with the few sorted patterns, undo
the sort and the signs. Where two patterns agree to rounding, the literal rule decides.

Row by row, no code depends on the rest of the batch (beyond the rounding of the matrix products). Knows nothing of files
or training. Source: H. Kamath, Residual Quantization Autoencoders, 2024, for the definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rqae.codebook import sorted_patterns
from rqae.config import RqaeConfig
from rqae.literal import choose_codes

__all__ = ["BlockedEncoder", "GridQuantiser", "Quantiser", "TableQuantiser"]

_TIE = 4e-7  # relative; a few units in the last place of float32
# rows at a time, so that what is worked on stays in the cache; a multiple of 128 keeps products bit-equal
_CHUNK = 1024


class Quantiser(Protocol):
    """Chooses codes: one row of p, one code."""

    def __call__(self, p: Tensor, quantizer: int) -> Tensor:
        """p (N, c) of one quantizer → codes (N,) int64."""


class TableQuantiser(Quantiser):
    """Compares with every code: for learned codebooks and for grids that are not normalised."""

    def __init__(self, codebook: Tensor, canonical: Tensor) -> None:
        self._codebook, self._canonical = codebook, canonical

    def __call__(self, p: Tensor, quantizer: int) -> Tensor:
        return choose_codes(p, self._codebook[quantizer], self._canonical)


class GridQuantiser(Quantiser):
    """Uses the symmetry of the normalised grid: sorts |p| and compares with its few sorted patterns."""

    def __init__(self, config: RqaeConfig, codebook: Tensor, canonical: Tensor) -> None:
        device, levels, dim = codebook.device, config.codebook_size, config.codebook_dim
        self._codebook, self._canonical = codebook[0], canonical
        steps = torch.tensor(sorted_patterns(levels, dim), dtype=torch.float64)  # (S, c)
        self._patterns = (steps / steps.norm(dim=-1, keepdim=True)).to(device, torch.float32)
        self._steps = (steps if levels % 2 else steps / 2).to(device, torch.float32)  # even grids step by two
        self._place = torch.tensor([float(levels ** (dim - 1 - a)) for a in range(dim)], device=device)
        self._centre = (levels**dim - 1) / 2
        self._zero_is_a_level = levels % 2 == 1

    def __call__(self, p: Tensor, quantizer: int) -> Tensor:
        magnitudes, order = p.abs().sort(dim=-1, descending=True)  # (N, c)
        cosines = self._patterns @ magnitudes.T  # (S, N), each times |p|
        best, pattern = cosines.max(dim=0)
        signed_place = torch.copysign(self._place, p).gather(1, order)
        index = (self._steps.index_select(0, pattern) * signed_place).sum(dim=-1).add_(self._centre)
        codes = self._canonical.index_select(0, index.long())
        close = cosines >= best * (1 - _TIE)  # the best itself, and what ties with it to rounding
        equal = magnitudes[:, 1:] == magnitudes[:, :-1]
        if int(torch.count_nonzero(close)) > len(p) or bool(equal.any()) or not self._zero_is_a_level:
            tied = (close.sum(dim=0) > 1) | equal.any(dim=-1) | (magnitudes[:, -1] == 0)
            codes[tied] = choose_codes(p[tied], self._codebook, self._canonical)
        return codes


def quantiser_for(config: RqaeConfig, codebook: Tensor, canonical: Tensor) -> Quantiser:
    """The quickest exact quantiser of a codebook (n_q, K, c)."""
    if config.quantization_method == "round_fsq" and config.codebook_size > 1 and config.codebook_dim > 1:
        return GridQuantiser(config, codebook, canonical)
    return TableQuantiser(codebook, canonical)


@dataclass(frozen=True, slots=True)
class BlockedEncoder:
    """The precomputed matrices of one model. ``m`` below is n_q · c, the flat code dimension."""

    codebook: Tensor  # (n_q, K, c)
    weight: Tensor  # (d, m): x @ weight + bias gives every p for r₁ = x
    bias: Tensor  # (m,)
    gram: Tensor  # (m, m): row j·c + b, column i·c + a holds (W_in,i W_out,j)[a, b]; only j < i is used
    quantise: Quantiser

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
        """From the stacked layers: w_in (n_q, c, d), b_in (n_q, c), w_out (n_q, d, c), b_out (n_q, d)."""
        count, width, dim = w_in.shape
        weight = w_in.reshape(count * width, dim).T.contiguous()  # (d, m)
        before = torch.zeros_like(b_out)
        before[1:] = b_out[:-1].cumsum(dim=0)
        bias = b_in - torch.einsum("nd,ncd->nc", before, w_in)
        gram = w_out.transpose(1, 2).reshape(count * width, dim) @ weight
        return cls(codebook, weight, bias.reshape(-1), gram, quantiser_for(config, codebook, canonical))

    def encode(self, x: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """x (N, d) → codes (N, depth) int64 and their vectors side by side (N, depth · c)."""
        end = depth * self.codebook.shape[-1]
        codes = torch.empty(depth, len(x), dtype=torch.int64, device=x.device)
        vectors = torch.empty(len(x), end, device=x.device)
        for start in range(0, len(x), _CHUNK):
            rows = slice(start, start + _CHUNK)
            p = torch.addmm(self.bias[:end], x[rows], self.weight[:, :end])  # (rows, depth · c)
            self._solve(p, codes[:, rows], vectors[rows], 0, depth)
        return codes.T.contiguous(), vectors

    def _solve(self, p: Tensor, codes: Tensor, vectors: Tensor, low: int, high: int) -> None:
        """Fix the codes of quantizers low..high-1, whose p already lacks everything left of ``low``."""
        width = self.codebook.shape[-1]
        if high - low == 1:
            codes[low] = self.quantise(p[:, low * width : high * width].contiguous(), low)
            vectors[:, low * width : high * width] = self.codebook[low].index_select(0, codes[low])
            return
        middle = low + (
            1 << ((high - low - 1).bit_length() - 1)
        )  # a power of two: a shorter depth takes the same steps
        self._solve(p, codes, vectors, low, middle)
        left, right = slice(low * width, middle * width), slice(middle * width, high * width)
        p[:, right].addmm_(vectors[:, left], self.gram[left, right], alpha=-1)
        self._solve(p, codes, vectors, middle, high)
