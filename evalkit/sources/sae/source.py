"""Sparse autoencoders and transcoders as feature sources: weights, a site, and the transform of the encoder's input.

A feature is a latent; its id is the latent's decimal index. An activation is the output of the dictionary's own encoder.
Knows no on-disk format: the format readers (``gemma_scope``, ``saelens``, …) build it. Reads and writes no files itself,
but weights may be read from disk on demand.
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

    ``steps``: transforms of the raw hidden state before the encoder, in order.
    ``l0``: the L0 declared by a folder name, a config or a card; None if there is none.
    ``declared``: other declared figures.
    ``format``: the name of the reader.
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
        """``transcoder`` if it reconstructs another site than it reads, else ``sae``."""
        return "sae" if self.site.reconstructs is None else "transcoder"

    @property
    def info(self) -> SourceInfo:
        """Metadata shown in tables."""
        return SourceInfo(
            self.name, self.kind, self.site.path, width=self.weights.width, l0=self.l0, declared=dict(self.declared)
        )

    def bind(self, subject: SubjectInfo) -> Self:
        """Check that the subject model has the site and its width. Raises SiteMismatch."""
        check_subject(self.name, self.site, self.weights.d_model, subject)
        return self

    def features(self) -> Sequence[FeatureId]:
        """The indices of all latents, in order."""
        return _Indices(self.weights.width)

    def activations(
        self, hidden: Float[Tensor, "batch pos d_model"], features: Sequence[FeatureId]
    ) -> Float[Tensor, "batch pos feature"]:
        """Activations of the chosen latents. Reads and multiplies only their encoder columns, except with top-k.

        Raises UnknownFeature for an id outside the dictionary, SiteMismatch for states of another width.
        """
        x = self._read(hidden)
        index = [self._index(feature) for feature in features]
        latents = None if self.weights.k is not None else self._latents(tuple(index), hidden.device)
        return self.weights.columns(transformed(x, self.steps)[0], index, latents)

    def threshold(self, feature: FeatureId) -> float:
        """Always 0: the encoder has already applied its own threshold. Raises UnknownFeature."""
        self._index(feature)
        return 0.0

    def reconstruct(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_out"]:
        """The reconstruction, in the units of the state at ``site.out``: an SAE's steps are undone, a transcoder's not."""
        x, undo = transformed(self._read(hidden), self.steps)
        found = self.weights.reconstruct(x)
        return undo(found) if self.site.reconstructs is None else found

    def directions(self, features: Sequence[FeatureId]) -> Float[Tensor, "feature d_out"]:
        """Decoder rows, in the units of the state at ``site.out`` up to a positive factor. Reads only these rows.

        Raises UnknownFeature, BadFile (NaN).
        """
        rows = take(self.weights.w_dec, np.array([self._index(feature) for feature in features], dtype=np.int64), 0)
        if self.site.reconstructs is not None or not self.steps:
            return rows
        any_state = torch.linspace(-1, 1, self.weights.d_model)[
            None
        ]  # between two states, the undone steps differ only by a factor and a shift, which cancel or do not matter
        _, undo = transformed(any_state, self.steps)
        return undo(rows) - undo(torch.zeros_like(rows))

    def transform(self) -> str:
        """The input transform in words."""
        return describe(self.steps)

    def _read(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != self.weights.d_model:
            raise SiteMismatch(
                self.name,
                expected=f"states of width {self.weights.d_model} at {self.site.path}",
                seen=f"width {hidden.shape[-1]}",
                fix="set its site with the option site=, or use the model it was trained on",
            )
        return hidden.float()

    def _latents(self, index: tuple[int, ...], device: torch.device) -> Latents:
        """The encoder of these latents. The last one is cached: a pass over a corpus needs the same one for every batch."""
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
    """A copy of the source with ``transform`` in place of its input transform (see ``parse_transform``).

    Raises BadConfig.
    """
    steps = parse_transform(transform)
    if not isinstance(source, SaeSource):
        raise BadConfig(
            source.name,
            expected="an SAE or transcoder, because the option transform= is given",
            seen=f"a dictionary of kind {source.info.kind}",
            fix="leave out transform= for this dictionary",
        )
    return replace(source, steps=steps)


class _Indices(Sequence[FeatureId]):
    """The ids of n latents, not stored as a list, because a dictionary may have millions."""

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
