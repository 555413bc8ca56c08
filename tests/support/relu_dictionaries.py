"""Small ReLU dictionaries over the states of ``table_states``, and the configuration of a run with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evalkit.config.run_config import RunConfig
from evalkit.records import Site, SourceInfo, SubjectInfo
from tests.support.table_states import D_MODEL, SITE

SUBJECT = SubjectInfo("m", D_MODEL, 2, np.ones(D_MODEL, dtype=np.float32), 1e-6)


@dataclass(frozen=True)
class ReluSource:
    """A small dictionary: relu(h·W − b); odd features can never fire."""

    width: int = 40
    l0: float = 3.0
    site: Site = SITE

    @property
    def name(self) -> str:
        return f"{self.site}/sae/width-{self.width}/l0-{self.l0:g}"

    @property
    def info(self) -> SourceInfo:
        return SourceInfo(self.name, "sae", self.site.path, self.width, self.l0)

    def bind(self, subject: SubjectInfo) -> ReluSource:
        return self

    def features(self) -> Sequence[str]:
        return [str(index) for index in range(self.width)]

    def activations(self, hidden: torch.Tensor, features: Sequence[str]) -> torch.Tensor:
        weights = torch.randn(D_MODEL, self.width, generator=torch.Generator().manual_seed(self.width))
        bias = torch.tensor([9.0, 1e9]).repeat(self.width // 2)
        picked = [int(feature) for feature in features]
        return (hidden @ weights[:, picked] - bias[picked]).clamp(min=0)

    def threshold(self, feature: str) -> float:
        return 0.0

    def reconstruct(self, hidden: torch.Tensor) -> torch.Tensor:
        return 0.5 * hidden


def run_config(**options: object) -> RunConfig:
    base = {
        "model": "m",
        "dictionaries": ("d",),
        "n_features": 8,
        "n_positives": 10,
        "context_length": 64,
        "window_length": 16,
    }
    return RunConfig.create(**{**base, **options})


def word(token: int) -> str:
    """Tokens 100–139 are five-letter words, the rest numbers."""
    return f" w{chr(97 + token % 26)}{chr(97 + token // 26)}ox" if 100 <= token < 140 else str(token)
