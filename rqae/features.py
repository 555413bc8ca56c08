"""Intensity of RQAE features: how strongly a token's codes agree with a feature's codes, at several depths in one pass.

A feature is the codes of one token occurrence, cut at depth k: its first k quantizers. With L_i the mean length of the
columns of W_out,i, its intensity on a token with codes t is C(f, t) = Σ_{i≤k} cos(C_{t_i}, C_{f_i}) L_i / Σ_{i≤k} L_i, in
[-1, 1]. With u(c) = (C_{c_i} √L_i)_i side by side this is a dot product, so many features on many tokens are a matrix
product, and shallower depths are partial sums of deeper ones. Uses no language model; reads and writes no files.
Source: H. Kamath, Residual Quantization Autoencoders, 2024 (depth k sums k + 1 quantizers there, k here).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rqae.encoding.codebook import normalised
from rqae.errors import RqaeError
from rqae.model import RQAE
from rqae.training.batches import derived_generator

__all__ = ["intensity", "intensity_literal", "layer_weights", "random_codes", "scaled_vectors"]


def layer_weights(model: RQAE) -> Tensor:
    """L_i, the mean over the columns of ‖W_out,i[:, j]‖₂, (n_q,) float32."""
    lengths: Tensor = model.w_out.norm(dim=1)  # (n_q, c)
    return lengths.mean(dim=1)


def scaled_vectors(model: RQAE, codes: Tensor) -> Tensor:
    """u(c): codes (N, k) of the first k quantizers → (N, k · c) float32. Zero vectors have cosine 0 with everything."""
    vectors = normalised(model.vectors(codes))  # (N, k, c)
    return (vectors * layer_weights(model)[: codes.shape[-1], None].sqrt()).flatten(1)


def intensity(model: RQAE, tokens: Tensor, features: Tensor, depths: Sequence[int]) -> Tensor:
    """Intensity of features on tokens at each depth: (N, k) and (F, k) codes → (D, N, F) float32 in [-1, 1].

    ``depths`` may be in any order; all are computed in one pass. Raises RqaeError for a depth beyond the codes.
    """
    limit = min(tokens.shape[-1], features.shape[-1])
    if not depths or not all(0 < depth <= limit for depth in depths):
        raise RqaeError(
            "intensity depths",
            expected=f"1 to {limit}",
            seen=str(list(depths)),
            fix="encode deeper, or use smaller depths",
        )
    deepest, width = max(depths), model.config.codebook_dim
    left = scaled_vectors(model, tokens[:, :deepest])
    right = scaled_vectors(model, features[:, :deepest])
    totals = layer_weights(model).cumsum(dim=0)
    running = left.new_zeros(len(tokens), len(features))
    at_depth: dict[int, Tensor] = {}
    done = 0
    for depth in sorted(set(depths)):
        columns = slice(done * width, depth * width)
        running.addmm_(left[:, columns], right[:, columns].T)
        at_depth[depth] = (running / totals[depth - 1]).clamp(-1, 1)
        done = depth
    return torch.stack([at_depth[depth] for depth in depths])


def intensity_literal(model: RQAE, tokens: Tensor, features: Tensor, depth: int) -> Tensor:
    """Intensity as defined, one feature at a time: (N, k) and (F, k) codes → (N, F). The reference for tests."""
    weights = layer_weights(model)[:depth]
    columns = []
    for feature in features:
        cosines = [
            torch.nn.functional.cosine_similarity(
                model.codebook[i][tokens[:, i]], model.codebook[i][feature[i]], dim=-1
            )
            for i in range(depth)
        ]
        columns.append((torch.stack(cosines, dim=-1) * weights).sum(dim=-1) / weights.sum())
    return torch.stack(columns, dim=-1)


def random_codes(model: RQAE, count: int, seed: int) -> Tensor:
    """A control for token features: codes drawn uniformly from each quantizer's distinct codes, (count, n_q) int64."""
    usable = model.codebook.norm(dim=-1)[0] > 0
    choices = torch.tensor(sorted(set(model.canonical[usable].tolist())))
    drawn = derived_generator(seed, "random codes").integers(len(choices), size=(count, model.config.num_quantizers))
    return choices[torch.from_numpy(drawn)]
