"""Attention sinks: tokens whose hidden state has a far larger norm than others; they are masked wherever states are used.

The only module that defines the limit. Knows tensors and token batches; no model, no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evalkit.records import TokenBatch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SINK_RATIO", "sink_limit", "valid_tokens"]

# In 2.4M tokens of SmolLM2-135M no state has a norm between 10 and 60 times the median, so the exact ratio does not
# matter there (results/decisions/0004-attention-sinks.md).
SINK_RATIO = 10.0


def sink_limit(norms: Tensor) -> float:
    """The norm above which a token is an attention sink: ``SINK_RATIO`` times the median of ``norms`` (token,)."""
    return SINK_RATIO * float(norms.median())


def valid_tokens(hidden: Tensor, batch: TokenBatch, limit: float) -> Tensor:
    """(batch, pos) bool: not masked in the corpus, and not an attention sink (a state whose norm exceeds ``limit``)."""
    import torch

    below_limit: Tensor = hidden.norm(dim=-1) <= limit
    return below_limit & torch.from_numpy(batch.valid).to(hidden.device)
