"""Loss and gradients of an RQAE in closed form, all as matrix products.

The loss is the mean squared error of the full reconstruction and, optionally, of shallower ones. Gradients are
straight-through (∂C_c/∂p is taken as the identity), and the residual that a quantizer reads is detached. So a quantizer's
gradient depends on the others only through the error and the residual. Both are linear in the codes, so no residual of
width d needs to be stored per quantizer.
With e = 2 (x̂ - x) / (N d), Q the code vectors side by side and g = e W_out: ∂W_out = eᵀQ, ∂W_in,i = g_iᵀ r_i, and
g_iᵀ r_i = g_iᵀ x - Σ_{j<i} (g_iᵀ Q_j W_out,jᵀ + g_iᵀ 1 b_out,jᵀ). Tests compare with autograd on the literal definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rqae.encoding.blocked import BlockedEncoder

__all__ = ["Precision", "loss_and_gradients"]

Precision: TypeAlias = Literal["float32", "bfloat16"]


def loss_and_gradients(
    x: Tensor,
    layers: dict[str, Tensor],
    encoder: BlockedEncoder,
    precision: Precision = "float32",
    nested_depths: Sequence[int] = (),
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """x (N, d), layers w_in, b_in, w_out, b_out and their encoder → squared error (N,), gradients, codes (N, n_q).

    The squared error is that of the full reconstruction.
    ``precision``: of the matrix products for the gradients; codes and errors are always computed in float32.
    ``nested_depths``: further depths whose errors are added to the loss (see ``_errors_behind``).
    """
    low = getattr(torch, precision)
    w_in, w_out, b_out = layers["w_in"], layers["w_out"], layers["b_out"]
    count, width, dim = w_in.shape
    decoder = w_out.transpose(1, 2).reshape(count * width, dim)  # (m, d)
    codes, q = encoder.encode_with_vectors(x, count)  # q (N, m)
    bounds = [0, *sorted({depth for depth in nested_depths if 0 < depth < count}), count]
    squared, errors = _errors_behind(x, q, decoder, b_out, bounds)
    q_low, decoder_low = q.to(low), decoder.to(low)
    g = torch.empty_like(q_low)  # (N, m)
    d_w_out, d_b_out = torch.empty_like(decoder), torch.empty_like(b_out)
    for (first, last), e in zip(pairwise(bounds), errors, strict=True):
        mine = slice(first * width, last * width)
        g[:, mine] = e.to(low) @ decoder_low[mine].T
        d_w_out[mine] = (q_low[:, mine].T @ e.to(low)).to(torch.float32)
        d_b_out[first:last] = e.sum(dim=0)
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
        "w_out": d_w_out.view(count, width, dim).transpose(1, 2),
        "b_out": d_b_out,
    }
    return squared, gradients, codes


def _errors_behind(
    x: Tensor, q: Tensor, decoder: Tensor, b_out: Tensor, bounds: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Squared error (N,) at full depth, and for each range of quantizers the error e (N, d) for its gradients.

    A range contributes to the error at its own depth and at all deeper ones. The error at each depth is weighted by the
    full-depth error divided by its own error (as a constant), so that a relative change counts the same at every depth.
    """
    width = q.shape[1] // len(b_out)
    running = -x
    at_depth = []
    for first, last in pairwise(bounds):
        mine = slice(first * width, last * width)
        running = torch.addmm(running + b_out[first:last].sum(dim=0), q[:, mine], decoder[mine])
        at_depth.append(running)
    squared = running.square().sum(dim=-1)
    whole = squared.sum()
    behind: list[Tensor] = []
    for error in reversed(at_depth):
        own = error * (2 / x.numel() * whole / error.square().sum().clamp_min(1e-30))
        behind.append(own + behind[-1] if behind else own)
    return squared, behind[::-1]
