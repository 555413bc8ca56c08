"""Control sources: baselines that run through the same pipeline as a dictionary, for comparison with its scores.

*Random directions* are meaningless projections of the hidden state. *Planted* features each fire on one token string, so
the pipeline must recover them. *Permuted* activations are real activations assigned to the wrong tokens. Knows no corpus
and no judge; reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from evalkit.errors import UnknownFeature
from evalkit.records import CONTROL_KIND, FeatureId, Site, SourceInfo, SubjectInfo, TokenBatch
from evalkit.seeds import derive, hash_priorities

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["PermutedSource", "PlantedSource", "RandomDirectionsSource"]


def _columns(known: Sequence[FeatureId], features: Sequence[FeatureId], name: str) -> list[int]:
    index = {feature: column for column, feature in enumerate(known)}
    missing = [feature for feature in features if feature not in index]
    if missing:
        raise UnknownFeature(name, expected=f"one of its {len(known)} features", seen=missing[0], fix="check the id")
    return [index[feature] for feature in features]


@dataclass(frozen=True)
class RandomDirectionsSource:
    """Projections of the raw hidden state on random (isotropic Gaussian) directions.

    Each feature is active on the share ``density`` of tokens with the largest projections.
    """

    site: Site
    d_model: int
    n_features: int
    density: float
    seed: int
    thresholds: Mapping[FeatureId, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.site}/null-random-directions"

    @property
    def info(self) -> SourceInfo:
        return SourceInfo(self.name, f"{CONTROL_KIND}random-directions", self.site.path, width=self.n_features)

    def bind(self, subject: SubjectInfo) -> Self:
        return self

    def features(self) -> Sequence[FeatureId]:
        return [str(index) for index in range(self.n_features)]

    def directions(self, features: Sequence[FeatureId]) -> Float[Tensor, "feature d_model"]:
        """The unit vector of each feature. Raises UnknownFeature."""
        return self._basis()[:, _columns(self.features(), features, self.name)].T

    def _basis(self) -> Float[Tensor, "d_model feature"]:
        generator = torch.Generator().manual_seed(derive(self.seed, "random-directions"))
        vectors = torch.randn(self.d_model, self.n_features, generator=generator)
        return torch.nn.functional.normalize(vectors, dim=0)

    def activations(
        self, hidden: Float[Tensor, "batch pos d_model"], features: Sequence[FeatureId]
    ) -> Float[Tensor, "batch pos feature"]:
        columns = _columns(self.features(), features, self.name)
        return hidden.float() @ self._basis()[:, columns].to(hidden.device)

    def threshold(self, feature: FeatureId) -> float:
        return self.thresholds[feature]

    def with_thresholds(self, thresholds: Mapping[FeatureId, float]) -> Self:
        return replace(self, thresholds=dict(thresholds))

    def reconstruct(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The projection of the state on the span of all directions."""
        basis: Tensor = torch.linalg.qr(self._basis().to(hidden.device)).Q
        return (hidden.float() @ basis) @ basis.T


@dataclass(frozen=True)
class _TokenControl:
    """Base of the controls that read tokens instead of hidden states. They reconstruct nothing."""

    site: Site

    def bind(self, subject: SubjectInfo) -> Self:
        return self

    def threshold(self, feature: FeatureId) -> float:
        return 0.0

    def reconstruct(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """All zeros."""
        return torch.zeros_like(hidden)


@dataclass(frozen=True)
class PlantedSource(_TokenControl):
    """Feature f has activation 1 on the tokens in ``token_groups[f]`` (all ids of one string) and 0 elsewhere."""

    token_groups: Mapping[FeatureId, tuple[int, ...]]

    @property
    def name(self) -> str:
        return f"{self.site}/null-planted"

    @property
    def info(self) -> SourceInfo:
        return SourceInfo(self.name, f"{CONTROL_KIND}planted", self.site.path, width=len(self.token_groups))

    def features(self) -> Sequence[FeatureId]:
        return list(self.token_groups)

    def activations(
        self, hidden: Float[Tensor, "batch pos d_model"], features: Sequence[FeatureId]
    ) -> Float[Tensor, "batch pos feature"]:
        raise TypeError("a planted source reads tokens, not hidden states: call token_activations")

    def token_activations(self, batch: TokenBatch, features: Sequence[FeatureId]) -> Float[Tensor, "batch pos feature"]:
        _columns(self.features(), features, self.name)
        hits = [np.isin(batch.token_ids, self.token_groups[feature]) for feature in features]
        return torch.from_numpy(np.stack(hits, axis=-1).astype(np.float32))


@dataclass(frozen=True)
class PermutedSource(_TokenControl):
    """Real activations on the wrong tokens: each token gets the activations of a calibration token drawn by hash.

    ``values`` (token, feature): the reference source's activations on the calibration tokens, 0 where not active. One
    draw per token serves all features, so features that fire together still do.
    """

    values: Float[Tensor, "token feature"]
    ids: tuple[FeatureId, ...]
    seed: int
    context_length: int

    @property
    def name(self) -> str:
        return f"{self.site}/null-permuted"

    @property
    def info(self) -> SourceInfo:
        return SourceInfo(self.name, f"{CONTROL_KIND}permuted", self.site.path, width=len(self.ids))

    def features(self) -> Sequence[FeatureId]:
        return list(self.ids)

    def activations(
        self, hidden: Float[Tensor, "batch pos d_model"], features: Sequence[FeatureId]
    ) -> Float[Tensor, "batch pos feature"]:
        raise TypeError("a permuted source reads token positions, not hidden states: call token_activations")

    def token_activations(self, batch: TokenBatch, features: Sequence[FeatureId]) -> Float[Tensor, "batch pos feature"]:
        columns = _columns(self.ids, features, self.name)
        tokens = batch.contexts[:, None] * self.context_length + np.arange(batch.token_ids.shape[1])
        drawn = hash_priorities(derive(self.seed, "permuted"), tokens) % np.uint64(len(self.values))
        return self.values[:, columns][torch.from_numpy(drawn.astype(np.int64))]
