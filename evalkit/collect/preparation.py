"""Binds the sources to the subject model and chooses the features a run scores, controls included.

Deterministic given the calibration sample, so a resumed run chooses the same. Knows sources only through their contracts.
Reads and writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.collect.activations import Chosen
from evalkit.collect.calibration import Calibration, Centre, top_share_threshold
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, CorpusError, UnknownFeature
from evalkit.protocols import CalibratedSource, CentredSource, FeatureSource
from evalkit.records import FeatureId, SourceInfo, SubjectInfo
from evalkit.seeds import derive, hash_priorities
from evalkit.sources.controls import PermutedSource, PlantedSource, RandomDirectionsSource
from evalkit.sources.rqae.source import RqaeSource, random_codes_source
from evalkit.subject.attention_sinks import valid_tokens

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Prepared", "prepare", "reference_of"]

_LOG = logging.getLogger(__name__)
_CANDIDATES = 64  # features whose aliveness is tested at a time


@dataclass(frozen=True, slots=True)
class Prepared:
    """A bound source, its chosen features, and what was measured of it on the calibration sample."""

    chosen: Chosen
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def info(self) -> SourceInfo:
        """The source's own, with the measured L0 where it declares none."""
        info = self.chosen.source.info
        return info if info.l0 is not None else replace(info, l0=self.measured.get("l0_measured"))


def prepare(
    config: RunConfig,
    sources: Sequence[FeatureSource],
    subject: SubjectInfo,
    calibration: Calibration,
    centres: Sequence[Centre],
    token_text: Callable[[int], str],
    measured: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Prepared]:
    """Every dictionary and control of the run. ``measured``: what the fit check found, by source.

    Raises SiteMismatch, BadConfig (two sources of one name), UnknownFeature.
    """
    bound = [source.bind(subject) for source in sources]
    _check_names(bound)
    found = measured or {}
    prepared = [
        _prepare_source(config, source, calibration, centres, dict(found.get(source.name, {}))) for source in bound
    ]
    controls = []
    if reference := reference_of(prepared):
        controls += _controls(config, reference, calibration, token_text, subject)
    if "random-codes" in config.controls and (deepest := _deepest_rqae(prepared)):
        controls.append(_random_codes(config, deepest, calibration))
    return prepared + controls


def _deepest_rqae(prepared: Sequence[Prepared]) -> RqaeSource | None:
    found = [one.chosen.source for one in prepared if isinstance(one.chosen.source, RqaeSource)]
    return max(found, key=lambda source: source.depth, default=None)


def _random_codes(config: RunConfig, source: RqaeSource, calibration: Calibration) -> Prepared:
    """As many features as the RQAE has, of codes that no token has, active on as many tokens."""
    null = random_codes_source(source, len(source.features()), derive(config.seed, "random codes"))
    values = _sample_values(null, null.features(), calibration)
    thresholds = top_share_threshold(values, [source.density] * len(null.features()))
    null = null.with_thresholds(dict(zip(null.features(), thresholds, strict=True)))
    return Prepared(Chosen(null, tuple(null.features())), {"matched_to": source.name})


def _check_names(sources: Sequence[FeatureSource]) -> None:
    seen: set[str] = set()
    for source in sources:
        if source.name in seen:
            raise BadConfig(
                source.name,
                expected="a name of its own for every dictionary",
                seen="two dictionaries of this name",
                fix="pass each dictionary once, or give one another name in its card.json",
            )
        seen.add(source.name)


def _prepare_source(
    config: RunConfig,
    source: FeatureSource,
    calibration: Calibration,
    centres: Sequence[Centre],
    measured: dict[str, Any],
) -> Prepared:
    if isinstance(source, CentredSource):
        ids = [centre.feature for centre in centres]
        source = source.with_centres(calibration.centre_states(source.site.path, centres), ids)
        chosen: Sequence[FeatureId] = ids
    elif config.feature_ids is not None:
        chosen = config.feature_ids
        _check_ids(source, chosen)
    elif isinstance(source, CalibratedSource):
        chosen = _in_hashed_order(source, config.seed)[: config.n_features]
    else:
        chosen, measured["alive_share"] = _choose_alive(source, config, calibration)
    if isinstance(source, CalibratedSource):
        values = _sample_values(source, chosen, calibration)
        thresholds = top_share_threshold(values, [source.density] * len(chosen))
        source = source.with_thresholds(dict(zip(chosen, thresholds, strict=True)))
    return Prepared(Chosen(source, tuple(chosen)), measured)


def _check_ids(source: FeatureSource, chosen: Sequence[FeatureId]) -> None:
    known = source.features()
    for feature in chosen:
        if feature not in known:
            raise UnknownFeature(
                f"feature {feature!r} of {source.name}",
                expected=f"one of its {len(known)} features, such as {', '.join(known[:3])}",
                seen=repr(feature),
                fix="name other ids in --features, or score this dictionary in a run of its own",
            )


def _in_hashed_order(source: FeatureSource, seed: int) -> _Ordered:
    ids = source.features()
    return _Ordered(ids, np.argsort(hash_priorities(derive(seed, "features", source.name), np.arange(len(ids)))))


@dataclass(frozen=True, slots=True)
class _Ordered:
    """Ids in another order, without a list of millions of them."""

    ids: Sequence[FeatureId]
    order: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, part: slice) -> list[FeatureId]:
        return [self.ids[int(index)] for index in self.order[part]]


def _choose_alive(source: FeatureSource, config: RunConfig, calibration: Calibration) -> tuple[list[FeatureId], float]:
    """Features in hashed order, keeping those that fire on the calibration sample, until there are enough.

    With a density band, those that fire on such a share of the sample's tokens. Also returns the share of those tested.
    """
    ids = _in_hashed_order(source, config.seed)
    low, high = config.density_band or (0.0, 1.0)
    chosen: list[FeatureId] = []
    tested = 0
    for first in range(0, len(ids), _CANDIDATES):
        candidates = ids[first : first + _CANDIDATES]
        densities = (_sample_values(source, candidates, calibration) > 0).double().mean(dim=0).tolist()
        for candidate, density in zip(candidates, densities, strict=True):
            tested += 1
            if density > 0 and low <= density <= high:
                chosen.append(candidate)
            if len(chosen) == config.n_features:
                return chosen, len(chosen) / tested
    wanted = "fire on the corpus" if config.density_band is None else f"fire on {low:g} to {high:g} of the tokens"
    if not chosen:
        raise CorpusError(
            source.name,
            expected=f"features that {wanted}",
            seen=f"none of {len(ids)} on {calibration.sample.sum()} contexts",
            fix="check the site, the layer and the subject model; or use a longer corpus"
            + ("" if config.density_band is None else ", or another band"),
        )
    _LOG.warning("%s: only %d of its %d features %s", source.name, len(chosen), len(ids), wanted)
    return chosen, len(chosen) / max(1, tested)


def _sample_values(
    source: FeatureSource, features: Sequence[FeatureId], calibration: Calibration
) -> Float[Tensor, "token feature"]:
    """Activations on the unmasked tokens of the calibration sample."""
    parts = []
    for batch in calibration.sample_batches():
        hidden = calibration.hidden(batch)[source.site.path]
        valid = valid_tokens(hidden, batch, calibration.limits[source.site.path])
        parts.append(source.activations(hidden, features)[valid].float().cpu())
    return torch.cat(parts)


def reference_of(prepared: Sequence[Prepared]) -> Prepared | None:
    """The dictionary that controls are matched to: of the SAEs of the commonest width the middle L0, else the first."""
    saes = [one for one in prepared if one.chosen.source.info.kind != "rqae" and one.chosen.features]
    if not saes:
        return next((one for one in prepared if one.chosen.features), None)
    widths = [one.chosen.source.info.width or 0 for one in saes]
    common = max(sorted(set(widths)), key=widths.count)
    group = [one for one in saes if one.chosen.source.info.width == common] or saes
    group.sort(key=lambda one: (one.chosen.source.info.l0 or 0.0, one.chosen.source.name))
    return group[len(group) // 2]


def _controls(
    config: RunConfig,
    reference: Prepared,
    calibration: Calibration,
    token_text: Callable[[int], str],
    subject: SubjectInfo,
) -> list[Prepared]:
    source, features = reference.chosen.source, reference.chosen.features
    thresholds = torch.tensor([source.threshold(feature) for feature in features])
    excess = (_sample_values(source, features, calibration) - thresholds).clamp(min=0)
    note = {"matched_to": source.name}
    controls: list[FeatureSource] = []
    if "random-directions" in config.controls:
        densities = (excess > 0).float().mean(dim=0).tolist()
        random = RandomDirectionsSource(
            source.site, subject.d_model, len(features), float(np.mean(densities)), derive(config.seed, "random")
        )
        values = _sample_values(random, random.features(), calibration)
        matched = dict(zip(random.features(), top_share_threshold(values, densities), strict=True))
        controls.append(random.with_thresholds(matched))
    if "planted" in config.controls:
        if groups := _planted_groups(config, calibration, token_text):
            controls.append(PlantedSource(source.site, groups))
        else:
            _LOG.warning("no planted control: the corpus has no word of one token that is frequent enough")
    if "permuted" in config.controls:
        controls.append(
            PermutedSource(
                source.site, excess, features, derive(config.seed, "permuted"), calibration.corpus.context_length
            )
        )
    return [
        Prepared(Chosen(control, tuple(control.features())), {} if isinstance(control, PlantedSource) else note)
        for control in controls
    ]


def _planted_groups(
    config: RunConfig, calibration: Calibration, token_text: Callable[[int], str]
) -> dict[FeatureId, tuple[int, ...]]:
    """Words of one token that are neither rare nor common, drawn by hash from the calibration sample.

    A group holds all token ids of the word (with and without the leading space). Words of five letters and more that can be
    expected in three times the windows that a test needs come first; where these do not suffice, those of four letters,
    then those expected in twice the windows. Common is ten times as frequent as the least, and above 0.3%.
    """
    corpus = calibration.corpus
    pool_tokens = corpus.n_contexts * (corpus.context_length - config.window_length) / 2  # inside windows, per pool
    least = config.n_positives / pool_tokens
    common = max(30 * least, 3e-3)
    sampled = np.concatenate([batch.token_ids[batch.valid] for batch in calibration.sample_batches()])
    ids, counts = np.unique(sampled, return_counts=True)
    groups: dict[str, list[int]] = {}
    totals: dict[str, int] = {}
    for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
        text = token_text(token).strip()
        if len(text) >= 4 and text.isalpha():
            groups.setdefault(text, []).append(token)
            totals[text] = totals.get(text, 0) + count
    shares = {text: total / len(sampled) for text, total in totals.items()}
    fitting = [text for text, share in shares.items() if 2 * least <= share <= common]
    priorities = hash_priorities(derive(config.seed, "planted"), [groups[text][0] for text in fitting])
    tier = {text: 2 * (shares[text] < 3 * least) + (len(text) < 5) for text in fitting}
    order = sorted(range(len(fitting)), key=lambda index: (tier[fitting[index]], int(priorities[index])))
    return {fitting[index]: tuple(groups[fitting[index]]) for index in order[: config.n_features]}
