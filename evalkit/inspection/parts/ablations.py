"""The two ablations that next-token losses are compared with. Knows hidden states, no dictionaries and no files."""

from __future__ import annotations

import torch

from evalkit.fit.losses import Replacement

__all__ = ["ablations"]


def ablations(mean: torch.Tensor, d_model: int) -> dict[str, Replacement]:
    """Replace hidden states (…, d_model) with zeros ("zero") or with their mean (d_model,) ("mean")."""

    def at_mean(hidden: torch.Tensor) -> torch.Tensor:
        return mean.to(hidden.device).expand(*hidden.shape[:-1], d_model)

    return {"zero": torch.zeros_like, "mean": at_mean}
