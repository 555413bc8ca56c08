"""RQAEs as feature sources: one source per depth; all depths of a checkpoint share one encoding.

Applies the subject model's final norm to the raw hidden state and undoes it in the reconstruction. A feature is the codes
of one token occurrence, so a source has no features until ``with_centres`` or ``with_features`` sets them. Reads checkpoint
folders in the published layout through the ``rqae`` package, and ``card.json`` in the same folder if it exists. Knows
nothing of how codes are computed, of text or of scores; writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from evalkit.errors import BadConfig, BadFile, BadShape, MissingFile, UnknownFeature
from evalkit.records import CONTROL_KIND, FeatureId, Site, SourceInfo, SubjectInfo
from evalkit.sources.rqae.shared_encoder import SharedEncoder, rqae_errors
from evalkit.subject.final_norm import denormalise, normalise
from evalkit.subject.sites import check_subject, site_of_hook
from rqae import RQAE, layer_weights, random_codes, scaled_vectors
from rqae.checkpoint import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["RqaeReader", "RqaeSource", "random_codes_source"]

_CONFIG_KEYS = {"dim", "codebook_dim", "codebook_size", "num_quantizers", "quantization_method"}


@dataclass(frozen=True, eq=False)
class RqaeSource:
    """One RQAE at one depth: its first ``depth`` quantizers. Activations are intensities, dense similarities in [-1, 1].

    ``density``: the share of tokens to count as active.
    ``ids``, ``codes``: the features and their codes, (feature, depth).
    ``thresholds``: θ of each feature.
    """

    encoder: SharedEncoder
    label: str  # the name without the depth
    site: Site
    depth: int
    density: float = 0.01
    declared: dict[str, Any] = field(default_factory=dict)
    kind: str = "rqae"
    ids: tuple[FeatureId, ...] = ()
    codes: Tensor | None = None
    thresholds: Mapping[FeatureId, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique among the dictionaries of a sweep: model, site, kind, checkpoint and depth."""
        return f"{self.label}/depth-{self.depth}"

    @property
    def info(self) -> SourceInfo:
        """Metadata shown in tables. Width: the checkpoint's quantizers. L0: ``depth``, the number of codes per token."""
        return SourceInfo(
            self.name,
            self.kind,
            self.site.path,
            width=self.encoder.model.config.num_quantizers,
            l0=float(self.depth),
            depth=self.depth,
            declared=dict(self.declared),
        )

    def bind(self, subject: SubjectInfo) -> Self:
        """A copy bound to the subject model, whose final norm it uses.

        Raises SiteMismatch (another width, no such site), BadConfig (the final norm is not an RMS norm).
        """
        dim = self.encoder.model.config.dim
        check_subject(self.name, self.site, dim, subject)
        normalise(torch.zeros(1, dim), subject)  # raises if the final norm is not an RMS norm
        return replace(self, encoder=self.encoder.bound(subject))

    def features(self) -> Sequence[FeatureId]:
        """The ids of its features. Sources of different depths made from the same token occurrences have the same ids."""
        return self.ids

    def with_centres(self, hidden: Float[Tensor, "centre d_model"], features: Sequence[FeatureId]) -> Self:
        """A copy whose features are the codes of the given token occurrences. ``hidden``: raw, one row per feature."""
        return self.with_features(features, self.encoder.codes(hidden))

    def with_features(self, features: Sequence[FeatureId], codes: Int[Tensor, "feature depth"]) -> Self:
        """A copy with these features; ``codes`` of at least ``depth`` quantizers. Raises BadConfig, BadShape."""
        if len(set(features)) != len(features):
            raise BadConfig(
                self.name, expected="features with different ids", seen="an id more than once", fix="remove duplicates"
            )
        if codes.ndim != 2 or len(codes) != len(features) or codes.shape[1] < self.depth:
            raise BadShape(
                f"codes of {self.name}",
                expected=f"shape ({len(features)}, {self.depth} or more)",
                seen=str(tuple(codes.shape)),
                fix="give one row per feature, encoded at this depth or deeper",
            )
        codes = codes[:, : self.depth].to("cpu", torch.int64)
        with rqae_errors(BadShape):
            self.encoder.model.vectors(codes.to(self.encoder.model.codebook.device))
        codes = self.encoder.model.canonical.cpu()[codes]
        return replace(self, ids=tuple(features), codes=codes, thresholds={})

    def with_thresholds(self, thresholds: Mapping[FeatureId, float]) -> Self:
        """A copy with these thresholds. Raises UnknownFeature."""
        self._rows(tuple(thresholds))
        return replace(self, thresholds={name: float(value) for name, value in thresholds.items()})

    def activations(
        self, hidden: Float[Tensor, "batch pos d_model"], features: Sequence[FeatureId]
    ) -> Float[Tensor, "batch pos feature"]:
        """Intensity C(f, t) of the chosen features on every token, in [-1, 1]. Raises UnknownFeature, BadShape."""
        rows = self._rows(features)
        tokens = self.encoder.codes(hidden)[:, : self.depth]
        model = self.encoder.model
        chosen = torch.empty(0, self.depth, dtype=torch.int64) if self.codes is None else self.codes[rows]
        right = scaled_vectors(model, chosen.to(tokens.device))  # (F, depth · c)
        values = scaled_vectors(model, tokens) @ right.T / layer_weights(model)[: self.depth].sum()
        return values.clamp_(-1, 1).reshape(*hidden.shape[:-1], len(rows))

    def threshold(self, feature: FeatureId) -> float:
        """θ of a feature. Raises UnknownFeature, BadConfig (threshold not set yet)."""
        self._rows((feature,))
        if feature not in self.thresholds:
            raise BadConfig(
                f"feature {feature!r} of {self.name}",
                expected="a threshold (a quantile of the feature's intensity over tokens)",
                seen="none yet",
                fix="measure quantiles on a sample of tokens and call with_thresholds",
            )
        return self.thresholds[feature]

    def reconstruct(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_out"]:
        """The reconstruction by the first ``depth`` quantizers, in the units of the raw hidden state."""
        codes = self.encoder.codes(hidden)[:, : self.depth]
        normed = self.encoder.model.decode(codes).reshape(hidden.shape)
        return denormalise(normed, hidden, self.encoder.known_subject())

    def directions(self, features: Sequence[FeatureId]) -> Float[Tensor, "feature d_model"]:
        """The direction of each feature in the raw hidden state: its decoded codes divided by the final norm's gain.

        Biases are left out, because all features share them. Raises UnknownFeature, BadConfig (not bound).
        """
        rows, model = self._rows(features), self.encoder.model
        if self.codes is None or not rows:
            return torch.zeros(0, model.config.dim)
        codes = self.codes[rows].to(model.w_out.device)
        normed = model.decode(codes) - model.b_out[: self.depth].sum(dim=0)
        gain = torch.from_numpy(self.encoder.known_subject().norm_gain).to(normed)
        return torch.where(gain == 0, torch.zeros_like(normed), normed / gain)

    def _rows(self, features: Sequence[FeatureId]) -> list[int]:
        places = {name: row for row, name in enumerate(self.ids)}
        for feature in features:
            if feature not in places:
                raise UnknownFeature(
                    f"feature {feature!r} of {self.name}",
                    expected=f"one of its {len(self.ids)} features",
                    seen=repr(feature),
                    fix="choose one of features()" if self.ids else "set features first: call with_centres",
                )
        return [places[feature] for feature in features]


def random_codes_source(source: RqaeSource, count: int, seed: int) -> RqaeSource:
    """A null control for RQAE features: random codes for every quantizer, not those of a token. Has no thresholds yet."""
    with rqae_errors(BadConfig):
        codes = random_codes(source.encoder.model, count, seed)
    null = replace(source, kind=f"{CONTROL_KIND}random-codes", label=f"{source.site}/null-random-codes", declared={})
    return null.with_features([f"random-{index}" for index in range(count)], codes)


class RqaeReader:
    """Opens a folder with ``config.json`` and ``model.safetensors`` in the published layout."""

    format = "rqae"
    options = frozenset({"model", "site", "name", "depths", "density", "subject"})

    def matches(self, path: Path) -> bool:
        """Whether ``path`` is a checkpoint folder (or a file in one) whose config has the keys of an RQAE."""
        folder = _folder(path)
        try:
            config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
            return isinstance(config, dict) and config.keys() >= _CONFIG_KEYS
        except (OSError, ValueError, RecursionError):
            return False

    def read(
        self, path: Path, *, depths: int | Sequence[int] = (16, 64, 256), density: float = 0.01, **options: Any
    ) -> Sequence[RqaeSource]:
        """One source per depth, deepest last.

        ``options``: ``model``, ``site`` and ``name`` override the card; ``subject`` is the model's name if nothing else
        gives it. Raises MissingFile, BadFile (naming the tensor), BadConfig.
        """
        if unknown := sorted(options.keys() - self.options):
            known = ", ".join(sorted(self.options))
            raise BadConfig(
                str(path), expected=f"the options {known}", seen=unknown[0], fix="remove or rename that option"
            )
        folder = _folder(path)
        if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
            raise MissingFile(
                str(path),
                expected=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
                seen="at least one of them missing",
                fix="check the path, or download the folder again",
            )
        card = _card(folder / "card.json")
        site = _site(folder, card, options)
        with rqae_errors(BadFile):
            model = RQAE.from_pretrained(folder)
        wanted = _depths(folder, depths, model.config.num_quantizers)
        if not 0 < density < 1:
            raise BadConfig("density", expected="a share between 0 and 1", seen=str(density), fix="use 0.01 for 1%")
        encoder = SharedEncoder(model, max(wanted))
        label = _label(folder, card, options, site)
        return [
            RqaeSource(encoder, label, site, depth, density, _declared(card, depth, model.config.num_quantizers))
            for depth in wanted
        ]


def _folder(path: Path) -> Path:
    return path.parent if path.name in (CONFIG_FILE, WEIGHTS_FILE) else path


def _depths(folder: Path, depths: int | Sequence[int], limit: int) -> list[int]:
    wanted = [depths] if isinstance(depths, int) else list(depths)
    if not wanted or not all(isinstance(depth, int) and 0 < depth <= limit for depth in wanted):
        raise BadConfig(
            str(folder),
            expected=f"depths from 1 to {limit}, its number of quantizers",
            seen=", ".join(str(depth) for depth in wanted) or "none",
            fix=f"pass depths={(*(depth for depth in (16, 64, 256) if depth < limit), limit)}",
        )
    return sorted(set(wanted))


def _site(folder: Path, card: Mapping[str, Any], options: Mapping[str, Any]) -> Site:
    path = options.get("site") or card.get("site")
    model = options.get("model") or card.get("model") or options.get("subject")
    if not path or not model:
        missing = "site" if not path else "model"
        raise BadConfig(
            str(folder),
            expected=f"a card.json with a {missing}, or the option {missing}=",
            seen="neither",
            fix="set where it reads, such as model=gemma-2-2b, site=layers.12",
        )
    named = str(path).split("/")[-1]
    return Site(str(model), site_of_hook(named) or named)


def _label(folder: Path, card: Mapping[str, Any], options: Mapping[str, Any], site: Site) -> str:
    """The name without the depth. A name that already starts with the site is used unchanged."""
    stem = str(options.get("name") or card.get("name") or folder.resolve().name)
    if stem.startswith(f"{site}/"):
        return stem
    return f"{site}/rqae/{stem.split('/')[-1]}"


def _declared(card: Mapping[str, Any], depth: int, quantizers: int) -> dict[str, Any]:
    """The card's figures for this depth: the FVU at this depth, and the share of codes in use in the whole checkpoint."""
    declared = {"alive_share": card["alive_share"]} if isinstance(card.get("alive_share"), int | float) else {}
    by_depth = card.get("fvu_by_depth")
    fvu = by_depth.get(str(depth)) if isinstance(by_depth, dict) else None
    if fvu is None and depth == quantizers:
        fvu = card.get("fvu")
    return {"fvu": fvu, **declared} if isinstance(fvu, int | float) else declared


def _card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, RecursionError) as error:
        raise BadFile(
            str(path),
            expected="a JSON card",
            seen="invalid JSON" if isinstance(error, ValueError) else str(error)[:200],
            fix="delete or repair the card",
        ) from error
    return card if isinstance(card, dict) else {}
