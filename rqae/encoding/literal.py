"""RQAE encoding exactly as it is defined, one quantizer after the other on the whole residual: the oracle.

Slow and memory-bound; ``rqae.encoding.blocked`` computes the same codes. Knows nothing of files or training.
Source: H. Kamath, Residual Quantization Autoencoders, 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rqae.model import RQAE

__all__ = ["choose_codes", "encode_literal"]


def choose_codes(p: Tensor, codebook: Tensor, canonical: Tensor) -> Tensor:
    """The code of the largest cosine (dot product for codes that are not normalised) with each row.

    p (N, c), codebook (K, c), canonical (K,) → (N,) int64. Ties, and p = 0, go to the lowest index.
    """
    norms = p.norm(dim=-1, keepdim=True)
    directions = p / torch.where(norms == 0, torch.ones_like(norms), norms)
    return canonical[(directions @ codebook.T).argmax(dim=-1)]  # argmax takes the first of equals


def encode_literal(model: RQAE, x: Tensor, depth: int | None = None) -> Tensor:
    """Codes of x, (N, d) → (N, depth) int64."""
    depth = model.config.num_quantizers if depth is None else depth
    residual = x.to(model.w_in)
    codes = []
    for i in range(depth):
        p = residual @ model.w_in[i].T + model.b_in[i]  # (N, c)
        chosen = choose_codes(p, model.codebook[i], model.canonical)
        residual = residual - (model.codebook[i][chosen] @ model.w_out[i].T + model.b_out[i])
        codes.append(chosen)
    return torch.stack(codes, dim=-1) if codes else torch.empty(len(x), 0, dtype=torch.int64)
