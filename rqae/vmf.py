"""Features made of several tokens: a von Mises–Fisher distribution of code vectors per layer, and a token's relevance.

In layer i the tokens' code vectors are points on the unit sphere of R^c. Their distribution has a mean direction μ_i and a
concentration κ_i, found by maximum likelihood; layers in which the tokens agree (κ_i is large) carry the feature. With few
tokens κ is overestimated: a single token agrees with itself in every layer. Fits in float64. Uses no language model,
text or files.
Source: H. Kamath, Residual Quantization Autoencoders, 2024; Banerjee et al., Clustering on the Unit Hypersphere using von
Mises–Fisher Distributions, JMLR 6, 2005.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rqae.encoding.codebook import choose_codes, normalised
from rqae.errors import RqaeError
from rqae.feature_sets import FeatureSet, check_codes
from rqae.features import layer_weights
from rqae.model import RQAE

__all__ = [
    "DEFAULT_KAPPA", "MAX_KAPPA", "VmfFeatures", "concentration", "fit_vmf", "log_density", "mean_resultant", "relevance",
]  # fmt: skip

MAX_KAPPA = 1e4  # points within a hundredth of a radian; two codes of the published codebook are 0.24 or more apart
DEFAULT_KAPPA = 5.0  # in 4 dimensions, the mean of the tokens' code vectors then has length 0.72
_SERIES_UP_TO = 32.0  # κ beyond which the Bessel functions' expansion at infinity is exact to rounding
_SERIES_TERMS = 72
_EXPANSION_TERMS = 24
_NEWTON_STEPS = 8
_TABLE_NUMBERS = 1 << 22  # densities of codes looked up at a time
_NO_DIRECTION = 1e-9  # a mean shorter than this is rounding


@dataclass(frozen=True, eq=False)
class VmfFeatures:
    """F features over k layers: ``mean`` (F, k, c) unit vectors, ``kappa`` (F, k) from 0 to MAX_KAPPA, both float64.

    ``layers`` (F, k) bool: the layers that define each feature, at least one. Raises RqaeError.
    """

    mean: Tensor
    kappa: Tensor
    layers: Tensor

    def __post_init__(self) -> None:
        shape = list(self.mean.shape[:-1])
        if self.mean.ndim != 3 or list(self.kappa.shape) != shape or list(self.layers.shape) != shape:
            raise RqaeError(
                "von Mises–Fisher features",
                expected="mean (F, k, c), kappa (F, k), layers (F, k)",
                seen=", ".join(str(list(each.shape)) for each in (self.mean, self.kappa, self.layers)),
                fix="make them with fit_vmf",
            )
        if not bool(((self.kappa >= 0) & (self.kappa <= MAX_KAPPA)).all()) or not bool(self.mean.isfinite().all()):
            raise RqaeError(
                "von Mises–Fisher features",
                expected=f"finite means, kappa from 0 to {MAX_KAPPA:g}",
                seen="other values",
                fix="make them with fit_vmf",
            )
        if not bool(self.layers.any(dim=1).all()):
            row = int((~self.layers.any(dim=1)).nonzero()[0])
            raise RqaeError(
                f"feature {row}",
                expected="at least one layer in which its tokens agree",
                seen=f"a largest kappa of {float(self.kappa[row].max()):.3g}",
                fix="lower kappa_above, use top_layers, or drop the feature",
            )

    def __len__(self) -> int:
        return len(self.mean)

    def nearest_codes(self, model: RQAE, labels: Sequence[str] | None = None) -> FeatureSet:
        """The features as codes, for intensities: in every layer the code with the largest cosine to μ_i.

        Shape (F, k), origin "tokens". All layers are included, so layers in which the tokens disagree count in full.
        """
        chosen = [
            choose_codes(self.mean[:, layer], normalised(model.codebook[layer].double()), model.canonical)
            for layer in range(self.mean.shape[1])
        ]
        names = [f"tokens {row}" for row in range(len(self))] if labels is None else labels
        return FeatureSet(model.config, torch.stack(chosen, dim=-1).cpu(), tuple(names), ("tokens",) * len(self))


def fit_vmf(
    model: RQAE,
    codes: Tensor | Sequence[Tensor],
    *,
    kappa_above: float | None = None,
    top_layers: int | None = None,
) -> VmfFeatures:
    """Fit one feature to each tensor of tokens' codes, (n, k) with any n; a single tensor is one feature.

    kappa_above: use the layers with κ of at least this; None: DEFAULT_KAPPA.
    top_layers: use this many layers with the largest κ instead; of equal ones, the lower layer.

    Chance level: random codes in 4 dimensions reach the default in 45% of the layers for
    n = 2, 18% for n = 3, 2% for n = 5, 0.006% for n = 10. A code vector of zero has no direction and shortens the
    mean. Raises RqaeError, also for a feature without any layer.
    """
    groups = [codes] if isinstance(codes, Tensor) and codes.ndim == 2 else list(codes)
    for number, group in enumerate(groups):
        check_codes(model.config, group, f"codes of feature {number}")
        if not len(group) or group.shape[1] != groups[0].shape[1]:
            raise RqaeError(
                f"codes of feature {number}",
                expected=f"at least one token, with {groups[0].shape[1]} quantizers like the first feature",
                seen=f"shape {list(group.shape)}",
                fix="encode all tokens at one depth, and drop features without tokens",
            )
    if not groups or (kappa_above is not None and top_layers is not None):
        raise RqaeError(
            "fit_vmf",
            expected="at least one feature, and at most one of kappa_above and top_layers",
            seen=f"{len(groups)} features, kappa_above {kappa_above}, top_layers {top_layers}",
            fix="leave out kappa_above or top_layers",
        )
    means = torch.stack([normalised(model.vectors(group).double()).mean(dim=0) for group in groups])  # (F, k, c)
    lengths = means.norm(dim=-1)
    anywhere = torch.zeros_like(means)
    anywhere[..., 0] = 1
    directions = torch.where(lengths[..., None] > _NO_DIRECTION, normalised(means), anywhere)
    kappa = concentration(lengths, model.config.codebook_dim)
    if top_layers is None:
        layers = kappa >= (DEFAULT_KAPPA if kappa_above is None else kappa_above)
    else:
        layers = _largest(kappa, top_layers)
    return VmfFeatures(directions, kappa, layers)


def relevance(model: RQAE, tokens: Tensor, features: VmfFeatures, density: Literal["peak", "raw"] = "peak") -> Tensor:
    """Relevance of features on tokens, (N, k or more) codes → (N, F) float32: Σ L_i p_i(C_{c_i}) / Σ L_i over its layers.

    ``density`` "peak" divides each layer's density by its maximum: p_i = exp(κ_i (μ_i · v − 1)). Then relevance lies in
    [0, 1], is 1 for a token at every mean, and each layer counts by its weight L_i. "raw" is the density itself, per unit
    of area. Its maximum grows like κ_i^{(c-1)/2}, so the sharpest layers dominate. For features of a single token, "peak"
    is the weighted share of layers with the same code. A code vector of zero has cosine 0 with every mean. Memory: two
    float32 (N, F). Raises RqaeError for codes of fewer layers than the features.
    """
    check_codes(model.config, tokens, "codes of tokens")
    depth = features.kappa.shape[1]
    if tokens.shape[1] < depth or density not in ("peak", "raw"):
        raise RqaeError(
            "relevance",
            expected=f"codes of {depth} quantizers, density 'peak' or 'raw'",
            seen=f"{tokens.shape[1]} quantizers, density {density!r}",
            fix="encode as deep as the features",
        )
    weights = layer_weights(model)[:depth].double() * features.layers  # (F, k)
    weights = weights / weights.sum(dim=1, keepdim=True)
    if density == "raw":
        weights = weights * log_density(features.mean, features.kappa, features.mean).exp()
    total = torch.zeros(len(tokens), len(features), device=weights.device)
    layers = features.layers.any(dim=0).nonzero().flatten().tolist()
    together = max(1, _TABLE_NUMBERS // max(1, model.config.num_codes * len(features)))
    for start in range(0, len(layers), together):
        tables, rows, height = [], [], 0
        for layer in layers[start : start + together]:
            codes, place = torch.unique(tokens[:, layer].to(weights.device, torch.int64), return_inverse=True)
            vectors = normalised(model.codebook[layer][codes].double())  # (distinct codes, c)
            cosines = (vectors @ features.mean[:, layer].T).clamp(max=1)  # (distinct codes, F)
            tables.append((weights[:, layer] * (features.kappa[:, layer] * (cosines - 1)).exp()).float())
            rows.append(place + height)
            height += len(codes)
        total += torch.nn.functional.embedding_bag(torch.stack(rows, dim=-1), torch.cat(tables), mode="sum")
    return total.clamp_(max=1) if density == "peak" else total


def log_density(mean: Tensor, kappa: Tensor, vectors: Tensor) -> Tensor:
    """Log density, per unit of area, at unit vectors: mean (…, c), kappa (…), vectors (…, c) → (…) float64, broadcast.

    Accurate for every κ ≥ 0; κ = 0 is the uniform density. In one dimension the sphere is two points, and the result is the
    log of a probability.
    """
    width = mean.shape[-1]
    log_area = math.log(2) + width / 2 * math.log(math.pi) - math.lgamma(width / 2)
    kappa = kappa.double()
    cosines = (mean.double() * vectors.double()).sum(dim=-1)
    return kappa * (cosines - 1) - _log_scaled_0f1(width / 2, kappa) - log_area


def mean_resultant(kappa: Tensor, width: int) -> Tensor:
    """A_c(κ) = I_{c/2}(κ) / I_{c/2-1}(κ), the length of the mean of the distribution's vectors in R^width, float64."""
    kappa = kappa.double()
    ratio = _log_scaled_0f1(width / 2 + 1, kappa) - _log_scaled_0f1(width / 2, kappa)
    return kappa / width * ratio.exp()


def concentration(resultant: Tensor, width: int) -> Tensor:
    """The maximum-likelihood κ: A_width(κ) = ``resultant``, the length in [0, 1] of the mean of unit vectors.

    0 for 0; at most MAX_KAPPA, which is the result for 1. Newton's method, started from R(c − R²)/(1 − R²) of Banerjee et
    al.
    """
    length = resultant.double().clamp(0, 1)
    if width == 1:
        return length.atanh().clamp(max=MAX_KAPPA)
    square = length.square()
    kappa = (length * (width - square) / (1 - square)).clamp(max=MAX_KAPPA)  # 1 → infinity → the maximum
    for _ in range(_NEWTON_STEPS):
        value = mean_resultant(kappa, width)
        ratio = torch.where(kappa > 0, value / kappa, 1 / width)
        slope = 1 - value.square() - (width - 1) * ratio
        kappa = (kappa - (value - length) / slope).clamp(0, MAX_KAPPA)
    return kappa


def _log_scaled_0f1(b: float, kappa: Tensor) -> Tensor:
    """log(e^{-κ} ₀F₁(; b; κ²/4)), float64: with b = v + 1 it is log of e^{-κ} I_v(κ) Γ(b) (2/κ)^v, and 0 at κ = 0.

    Up to _SERIES_UP_TO it sums the power series, whose terms are all positive; above, the expansion of I_v at infinity.
    """
    small, large = kappa.clamp(max=_SERIES_UP_TO), kappa.clamp(min=_SERIES_UP_TO)
    term = (-small).exp()
    series = term.clone()
    for m in range(1, _SERIES_TERMS + 1):
        term = term * small.square() / (4 * m * (m + b - 1))
        series += term
    order = b - 1
    term = torch.ones_like(large)
    expansion = term.clone()
    for m in range(1, _EXPANSION_TERMS + 1):
        term = term * ((2 * m - 1) ** 2 - 4 * order**2) / (8 * m * large)
        expansion += term
    front = math.lgamma(b) - order * (large / 2).log() - (2 * math.pi * large).log() / 2
    return torch.where(kappa <= _SERIES_UP_TO, series.log(), front + expansion.log())


def _largest(kappa: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` largest values of each row; the first of equals."""
    if not 0 < count <= kappa.shape[1]:
        raise RqaeError(
            "top_layers", expected=f"1 to {kappa.shape[1]}", seen=str(count), fix="use at most the number of layers"
        )
    chosen = kappa.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(kappa, dtype=torch.bool).scatter(1, chosen, True)
