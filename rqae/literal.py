"""RQAE encoding exactly as defined, one quantizer after the other on the full residual: the reference for tests.

Slow and memory-bound; ``rqae.encoding.blocked`` computes the same codes. Reads and writes no files.
Source: H. Kamath, Residual Quantization Autoencoders, 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rqae.encoding.codebook import choose_codes
from rqae.model import RQAE

__all__ = ["encode_literal"]


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
