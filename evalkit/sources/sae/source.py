"""Sparse autoencoders and transcoders as feature sources: weights, a site, and what happens to a state before the encoder.

Knows nothing of formats: readers of one on-disk format each (``gemma_scope``, ``saelens``, …) build it. A feature is a
latent, its id the decimal index; an activation is what the dictionary's own encoder returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from evalkit.errors import BadConfig, SiteMismatch, UnknownFeature
from evalkit.records import FeatureId, Site, SourceInfo, SubjectInfo
from evalkit.sources.sae.transforms import Step, describe, parse_transform, transformed
from evalkit.sources.sae.weights import Latents, SaeWeights
from evalkit.subject.sites import check_subject
from evalkit.util.tensor_files import take

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from evalkit.protocols import FeatureSource

__all__ = ["SaeSource", "with_transform"]


@dataclass(frozen=True, eq=False)
class SaeSource:
    """One SAE or transcoder as a feature source.

    ``steps`` is what happens to the raw hidden state before the encoder. ``l0`` is the declared one (folder name, config or
    card), None if nothing declares it. ``format`` is the reader's name.
    """

    weights: SaeWeights
    site: Site
    l0: float | None = None
    declared: dict[str, Any] = field(default_factory=dict)
    label: str | None = None  # replaces the name made from the width and L0
    steps: tuple[Step, ...] = ()
    format: str = "sae"
    _kept: dict[tuple[Any, ...], Latents] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        """Unique among the dictionaries of a sweep: model, site, kind, width and L0."""
        l0 = "unknown" if self.l0 is None else f"{self.l0:g}"
        return self.label or f"{self.site}/{self.kind}/width-{self.weights.width}/l0-{l0}"

    @property
    def kind(self) -> str:
        """``sae``, or ``transcoder`` where it reconstructs another site than it reads."""
        return "sae" if self.site.reconstructs is None else "transcoder"

    @property
    def info(self) -> SourceInfo:
        """What a table prints."""
        return SourceInfo(
            self.name, self.kind, self.site.path, width=self.weights.width, l0=self.l0, declared=dict(self.declared)
        )

    def bind(self, subject: SubjectInfo) -> Self:
        """Check the width of what it reads and the site. Raises SiteMismatch."""
        check_subject(self.name, self.site, self.weights.d_model, subject)
        return self

    def features(self) -> Sequence[FeatureId]:
        """The indices of all latents, in order."""
        return _Indices(self.weights.width)

    def activations(
        self, hidden: Float[Tensor, "batch pos d_model"], features: Sequence[FeatureId]
    ) -> Float[Tensor, "batch pos feature"]:
        """Activation of the chosen latents; only their encoder columns are read and multiplied, but for top-k.

        Raises UnknownFeature for an id outside the dictionary, SiteMismatch for another width.
        """
        x = self._read(hidden)
        index = [self._index(feature) for feature in features]
        latents = None if self.weights.k is not None else self._latents(tuple(index), hidden.device)
        return self.weights.columns(transformed(x, self.steps)[0], index, latents)

    def threshold(self, feature: FeatureId) -> float:
        """0: the encoder's own threshold has been applied, so active means above 0. Raises UnknownFeature."""
        self._index(feature)
        return 0.0

    def reconstruct(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_out"]:
        """The reconstruction in the units of the state at ``site.out``: steps are undone but for transcoders."""
        x, undo = transformed(self._read(hidden), self.steps)
        found = self.weights.reconstruct(x)
        return undo(found) if self.site.reconstructs is None else found

    def directions(self, features: Sequence[FeatureId]) -> Float[Tensor, "feature d_out"]:
        """Decoder rows, in the units of the state at ``site.out`` up to a positive factor; only these rows are read.

        Raises UnknownFeature, BadFile (NaN).
        """
        rows = take(self.weights.w_dec, np.array([self._index(feature) for feature in features], dtype=np.int64), 0)
        if self.site.reconstructs is not None or not self.steps:
            return rows
        any_state = torch.linspace(-1, 1, self.weights.d_model)[
            None
        ]  # steps differ between states by a factor and a shift
        _, undo = transformed(any_state, self.steps)
        return undo(rows) - undo(torch.zeros_like(rows))

    def transform(self) -> str:
        """What happens to the raw hidden state, in words."""
        return describe(self.steps)

    def _read(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != self.weights.d_model:
            raise SiteMismatch(
                self.name,
                expected=f"states of width {self.weights.d_model} at {self.site.path}",
                seen=f"width {hidden.shape[-1]}",
                fix="name its site with the option site=, or use the model it was trained on",
            )
        return hidden.float()

    def _latents(self, index: tuple[int, ...], device: torch.device) -> Latents:
        """Those of the last call are kept: a pass over a corpus asks for the same ones in every batch."""
        key = (index, device)
        if (found := self._kept.get(key)) is None:
            found = self.weights.gather(np.array(index, dtype=np.int64), device)
            self._kept.clear()
            self._kept[key] = found
        return found

    def _index(self, feature: FeatureId) -> int:
        if feature in self.features():
            return int(feature)
        raise UnknownFeature(
            f"feature {feature!r} of {self.name}",
            expected=f"a decimal index from 0 to {self.weights.width - 1}",
            seen=repr(feature),
            fix="choose a feature of this dictionary",
        )


def with_transform(source: FeatureSource, transform: str) -> FeatureSource:
    """The source with another input transform than it declares (see ``parse_transform``). Raises BadConfig."""
    steps = parse_transform(transform)
    if not isinstance(source, SaeSource):
        raise BadConfig(
            source.name,
            expected="an SAE or transcoder, whose input transform can be declared",
            seen=f"a dictionary of kind {source.info.kind}",
            fix="leave the transform out for this one",
        )
    return replace(source, steps=steps)


class _Indices(Sequence[FeatureId]):
    """The ids of n latents without a list of them: dictionaries have millions."""

    def __init__(self, count: int) -> None:
        self._range = range(count)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        found = self._range[index]
        return [str(each) for each in found] if isinstance(found, range) else str(found)

    def __contains__(self, feature: object) -> bool:
        if not (isinstance(feature, str) and feature.isascii() and feature.isdecimal()):
            return False
        return feature == str(int(feature)) and int(feature) in self._range
