"""Sparse autoencoders as feature sources: one normalised record of the weights, one source that runs it.

Knows nothing of files: readers of one on-disk format each (``gemma_scope``) build the record. A feature is a latent,
its id the decimal index; an activation is in the units of the raw hidden state (the decoder row's length apart).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import torch

from evalkit.errors import BadShape, UnknownFeature
from evalkit.records import FeatureId, Site, SourceInfo, SubjectInfo
from evalkit.sources.binding import check_subject

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Activation", "SaeFit", "SaeSource", "SaeWeights", "measure_fit"]

Activation: TypeAlias = Literal["relu", "jumprelu"]


@dataclass(frozen=True, slots=True, eq=False)
class SaeWeights:
    """The weights of one SAE, float32.

    ``w_enc`` (d, n), ``b_enc`` (n,), ``w_dec`` (n, d), ``b_dec`` (d,), ``threshold`` (n,) for JumpReLU, None for ReLU.
    ``b_dec`` is never subtracted from the input: a format that does so folds it into ``b_enc``. Raises BadShape when
    the shapes do not fit together.
    """

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None

    def __post_init__(self) -> None:
        if self.w_enc.ndim != 2:
            raise _bad_shape("w_enc", "two dimensions (d_model, width)", self.w_enc)
        width = (self.width,)
        expected = {"b_enc": width, "w_dec": (self.width, self.d_model), "b_dec": (self.d_model,), "threshold": width}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise _bad_shape(name, f"shape {shape}", tensor)

    @property
    def d_model(self) -> int:
        """Width of the hidden state."""
        return int(self.w_enc.shape[0])

    @property
    def width(self) -> int:
        """Number of latents."""
        return int(self.w_enc.shape[1])

    @property
    def activation(self) -> Activation:
        """The encoder's non-linearity."""
        return "relu" if self.threshold is None else "jumprelu"

    def to(self, device: torch.device) -> SaeWeights:
        """The same weights on another device; itself if they are there."""
        if self.w_enc.device == device:
            return self
        threshold = None if self.threshold is None else self.threshold.to(device)
        w_enc, b_enc, w_dec, b_dec = (tensor.to(device) for tensor in (self.w_enc, self.b_enc, self.w_dec, self.b_dec))
        return SaeWeights(w_enc, b_enc, w_dec, b_dec, threshold)

    def encode(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch width"]:
        """Activations of every latent.

        Source: Gemma Scope, arXiv 2408.05147, eq. 1 and 3 (JumpReLU: the pre-activation where it exceeds θ, else 0).
        """
        return _activate(hidden @ self.w_enc + self.b_enc, self.threshold)

    def decode(self, activations: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of the raw hidden state. Source: arXiv 2408.05147, eq. 2."""
        return activations @ self.w_dec + self.b_dec


@dataclass(frozen=True, slots=True)
class SaeFit:
    """How well an SAE fits some tokens.

    ``fvu``: summed squared error over summed squared distance to the mean; ``l0``: active latents a token;
    ``alive_share``: of the latents, active on at least one of the tokens.
    """

    fvu: float
    l0: float
    alive_share: float
    n_tokens: int


def measure_fit(weights: SaeWeights, rows: Iterable[Float[Tensor, "row d_model"]]) -> SaeFit:
    """FVU, L0 and alive share over chunks of raw hidden states. Sums in float64. Raises BadShape on no rows."""
    error = square = active = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(weights.d_model, dtype=torch.float64)
    fired = torch.zeros(weights.width, dtype=torch.bool)
    count = 0
    for chunk in rows:
        activations = weights.encode(chunk)
        error = error + (chunk - weights.decode(activations)).double().square().sum()
        square = square + chunk.double().square().sum()
        total += chunk.double().sum(0)
        active = active + (activations > 0).sum()
        fired |= (activations > 0).any(0)
        count += len(chunk)
    if count == 0:
        raise BadShape("hidden states", expected="at least one row", seen="none", fix="give a longer corpus")
    variance = square - total.square().sum() / count
    return SaeFit(float(error / variance), float(active) / count, float(fired.double().mean()), count)


@dataclass(frozen=True, eq=False)
class SaeSource:
    """One SAE as a feature source. ``l0`` is the declared one (folder name or card), None if nothing declares it."""

    weights: SaeWeights
    site: Site
    l0: float | None = None
    declared: dict[str, Any] = field(default_factory=dict)
    label: str | None = None  # replaces the name made from the width and L0

    @property
    def name(self) -> str:
        """Unique among the dictionaries of a sweep: model, site, kind, width and L0."""
        l0 = "unknown" if self.l0 is None else f"{self.l0:g}"
        return self.label or f"{self.site}/sae/width-{self.weights.width}/l0-{l0}"

    @property
    def info(self) -> SourceInfo:
        """What a table prints."""
        return SourceInfo(
            self.name, "sae", self.site.path, width=self.weights.width, l0=self.l0, declared=dict(self.declared)
        )

    def bind(self, subject: SubjectInfo) -> Self:
        """Check the width of the residual stream and the site. Raises SiteMismatch."""
        check_subject(self.name, self.site, self.weights.d_model, subject)
        return self

    def features(self) -> Sequence[FeatureId]:
        """The indices of all latents, in order."""
        return [str(index) for index in range(self.weights.width)]

    def activations(
        self, hidden: Float[Tensor, "batch pos d_model"], features: Sequence[FeatureId]
    ) -> Float[Tensor, "batch pos feature"]:
        """Activation of the chosen latents; only their encoder columns are multiplied.

        Units: those of the raw hidden state. Raises UnknownFeature for an id outside the dictionary.
        """
        weights = self.weights.to(hidden.device)
        columns = torch.tensor([self._index(feature) for feature in features], dtype=torch.int64, device=hidden.device)
        threshold = None if weights.threshold is None else weights.threshold[columns]
        return _activate(hidden.float() @ weights.w_enc[:, columns] + weights.b_enc[columns], threshold)

    def threshold(self, feature: FeatureId) -> float:
        """0: the encoder's own threshold has been applied, so active means above 0. Raises UnknownFeature."""
        self._index(feature)
        return 0.0

    def reconstruct(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_out"]:
        """The reconstruction of the raw hidden state."""
        weights = self.weights.to(hidden.device)
        return weights.decode(weights.encode(hidden.float()))

    def _index(self, feature: FeatureId) -> int:
        if (
            feature.isascii()
            and feature.isdecimal()
            and int(feature) < self.weights.width
            and feature == str(int(feature))
        ):
            return int(feature)
        raise UnknownFeature(
            f"feature {feature!r} of {self.name}",
            expected=f"a decimal index from 0 to {self.weights.width - 1}",
            seen=repr(feature),
            fix="choose a feature of this dictionary",
        )


def _activate(pre: Tensor, threshold: Tensor | None) -> Tensor:
    active = torch.relu(pre)
    return active if threshold is None else active * (pre > threshold)


def _bad_shape(name: str, expected: str, tensor: Tensor) -> BadShape:
    return BadShape(
        f"tensor {name}",
        expected=expected,
        seen=f"shape {tuple(tensor.shape)}",
        fix="check that all tensors belong to one SAE and are not transposed",
    )
