"""The two ablations to compare next-token losses with. Knows hidden states, but no dictionaries and no files."""

from __future__ import annotations

import torch

from evalkit.fit.losses import Replacement

__all__ = ["ablations"]


def ablations(mean: torch.Tensor, d_model: int) -> dict[str, Replacement]:
    """Two replacements of hidden states (…, d_model): by zeros ("zero") and by ``mean`` (d_model,) ("mean")."""

    def at_mean(hidden: torch.Tensor) -> torch.Tensor:
        return mean.to(hidden.device).expand(*hidden.shape[:-1], d_model)

    return {"zero": torch.zeros_like, "mean": at_mean}
