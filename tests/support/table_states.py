"""Hidden states known in closed form, for tests of passes over a corpus."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from evalkit.corpus.windows import build_grid
from evalkit.records import Site, TokenBatch
from tests.support.array_corpus import ArrayCorpus

D_MODEL = 32


def pools_of(corpus: ArrayCorpus, seed: int) -> np.ndarray:
    return build_grid(corpus, window_length=16, skip_first=1, seed=seed).context_pools


SITE = Site("m", "layers.1")


@dataclass
class TableStates:
    """Hidden states by table look-up of the token id: a one-layer model whose states are known in closed form."""

    seen: list[int] = field(default_factory=list)  # contexts asked for
    limits: dict[str, float] = field(default_factory=lambda: {SITE.path: 1e9})

    def table(self) -> torch.Tensor:
        return torch.randn(5001, D_MODEL, generator=torch.Generator().manual_seed(0)).bfloat16().float()

    def hidden(self, token_ids: np.ndarray | TokenBatch) -> dict[str, torch.Tensor]:
        if isinstance(token_ids, TokenBatch):
            self.seen += token_ids.contexts.tolist()
            token_ids = token_ids.token_ids
        return {SITE.path: self.table()[torch.from_numpy(token_ids)]}
