"""Loss and gradients of an RQAE in closed form, all as matrix products.

The loss is the mean squared error of the whole reconstruction. Straight through each quantizer (∂C_c/∂p is taken as the
identity), and the residual that a quantizer reads is detached, so every quantizer's gradient depends on the others only
through the error and the residual. Both are linear in the codes: no residual of width d is kept per quantizer.
With e = 2 (x̂ - x) / (N d), Q the code vectors side by side and g = e W_out: ∂W_out = eᵀQ, ∂W_in,i = g_iᵀ r_i, and
g_iᵀ r_i = g_iᵀ x - Σ_{j<i} (g_iᵀ Q_j W_out,jᵀ + g_iᵀ 1 b_out,jᵀ). Tests compare with autograd on the literal definition.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rqae.blocked import BlockedEncoder

__all__ = ["Precision", "loss_and_gradients"]

Precision: TypeAlias = Literal["float32", "bfloat16"]


def loss_and_gradients(
    x: Tensor, layers: dict[str, Tensor], encoder: BlockedEncoder, precision: Precision = "float32"
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """x (N, d), layers w_in, b_in, w_out, b_out and their encoder → squared error (N,), gradients, codes (N, n_q).

    ``precision`` is that of the gradients' matrix products; codes and errors are always computed in float32.
    """
    low = getattr(torch, precision)
    w_in, w_out, b_out = layers["w_in"], layers["w_out"], layers["b_out"]
    count, width, dim = w_in.shape
    decoder = w_out.transpose(1, 2).reshape(count * width, dim)  # (m, d)
    codes, q = encoder.encode_with_vectors(x, count)  # q (N, m)
    error = torch.addmm(b_out.sum(dim=0) - x, q, decoder)  # (N, d): x̂ - x
    squared = error.square().sum(dim=-1)
    e = error.mul_(2 / x.numel())
    e_low, q_low, decoder_low = e.to(low), q.to(low), decoder.to(low)
    g = e_low @ decoder_low.T  # (N, m)
    column_sums = g.sum(dim=0, dtype=torch.float32)  # (m,)
    interaction = (g.T @ q_low).view(count, width, count * width)  # row block i, column j·c + b
    earlier = torch.ones(count, count, dtype=torch.bool, device=x.device).tril(-1).repeat_interleave(width, dim=1)
    interaction.masked_fill_(~earlier[:, None, :], 0)
    before = torch.zeros_like(b_out)
    before[1:] = b_out[:-1].cumsum(dim=0)
    d_w_in = (g.T @ x.to(low)).addmm_(interaction.view(count * width, -1), decoder_low, alpha=-1)
    d_w_in = d_w_in.to(torch.float32).view(count, width, dim)
    d_w_in -= column_sums.view(count, width, 1) * before[:, None, :]
    gradients = {
        "w_in": d_w_in,
        "b_in": column_sums.view(count, width),
        "w_out": (q_low.T @ e_low).to(torch.float32).view(count, width, dim).transpose(1, 2),
        "b_out": e.sum(dim=0).expand(count, dim),
    }
    return squared, gradients, codes
