"""Binds the sources to the subject model and chooses the features a run scores, controls included.

Deterministic given the calibration sample, so a resumed run chooses the same. Knows sources only through their contracts.
Reads and writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evalkit.calibration import Calibration, Centre, measure_fit, top_share_threshold
from evalkit.collection import Chosen, valid_tokens
from evalkit.config import RunConfig
from evalkit.errors import BadConfig, CorpusError
from evalkit.protocols import CalibratedSource, CentredSource, FeatureSource
from evalkit.records import FeatureId, SourceInfo, SubjectInfo
from evalkit.seeds import derive, hash_priorities
from evalkit.sources.controls import PermutedSource, PlantedSource, RandomDirectionsSource

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Prepared", "prepare", "reference_of"]

_LOG = logging.getLogger(__name__)
_FIT_CONTEXTS = 32  # contexts that FVU and L0 are measured on
_FIT_RATIO = 1.5  # how far the measured L0 may be from the declared one
_FIT_WIDTH = 1 << 17  # wider dictionaries are not encoded whole just to count L0
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
) -> list[Prepared]:
    """Every dictionary and control of the run. Raises SiteMismatch, BadConfig (two sources of one name)."""
    bound = [source.bind(subject) for source in sources]
    _check_names(bound)
    prepared = [_prepare_source(config, source, calibration, centres) for source in bound]
    if reference := reference_of(prepared):
        prepared += _controls(config, reference, calibration, token_text, subject)
    return prepared


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
    config: RunConfig, source: FeatureSource, calibration: Calibration, centres: Sequence[Centre]
) -> Prepared:
    measured = _measure(source, calibration)
    if isinstance(source, CentredSource):
        ids = [centre.feature for centre in centres]
        source = source.with_centres(calibration.centre_states(source.site.path, centres), ids)
        chosen: Sequence[FeatureId] = ids
    else:
        chosen, measured["alive_share"] = _choose_alive(source, config, calibration)
    if isinstance(source, CalibratedSource):
        values = _sample_values(source, chosen, calibration)
        thresholds = top_share_threshold(values, [source.density] * len(chosen))
        source = source.with_thresholds(dict(zip(chosen, thresholds, strict=True)))
    return Prepared(Chosen(source, tuple(chosen)), measured)


def _choose_alive(source: FeatureSource, config: RunConfig, calibration: Calibration) -> tuple[list[FeatureId], float]:
    """Features in hashed order, keeping those that fire on the calibration sample, until there are enough."""
    ids = source.features()
    order = np.argsort(hash_priorities(derive(config.seed, "features", source.name), np.arange(len(ids))))
    alive: list[FeatureId] = []
    tested = 0
    for first in range(0, len(ids), _CANDIDATES):
        candidates = [ids[index] for index in order[first : first + _CANDIDATES]]
        fires = (_sample_values(source, candidates, calibration) > 0).any(dim=0).tolist()
        for candidate, fired in zip(candidates, fires, strict=True):
            tested += 1
            if fired:
                alive.append(candidate)
            if len(alive) == config.n_features:
                return alive, len(alive) / tested
    if not alive:
        raise CorpusError(
            source.name,
            expected="features that fire on the corpus",
            seen=f"none of {len(ids)} on {calibration.sample.sum()} contexts",
            fix="check the site, the layer and the subject model; or use a longer corpus",
        )
    _LOG.warning("%s: only %d of its %d features fire on the calibration sample", source.name, len(alive), len(ids))
    return alive, len(alive) / max(1, tested)


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


def _measure(source: FeatureSource, calibration: Calibration) -> dict[str, Any]:
    rows = calibration.rows[calibration.sample][:_FIT_CONTEXTS]
    batch = calibration.corpus.batch(rows)
    hidden = calibration.hidden(batch)[source.site.path]
    valid = valid_tokens(hidden, batch, calibration.limits[source.site.path])
    measured: dict[str, Any] = {"fvu_measured": measure_fit(source.reconstruct, hidden, valid)}
    if measured["fvu_measured"] >= 1:
        _LOG.warning(
            "%s: reconstruction is worse than the mean (FVU %.2f); is it the right site, layer and model?",
            source.name,
            measured["fvu_measured"],
        )
    ids = () if isinstance(source, CentredSource) else source.features()
    if 0 < len(ids) <= _FIT_WIDTH:
        active = source.activations(hidden, ids)[valid] > 0
        measured["l0_measured"] = float(active.sum(dim=1).float().mean())
        declared = source.info.l0
        if declared and not 1 / _FIT_RATIO < measured["l0_measured"] / declared < _FIT_RATIO:
            _LOG.warning(
                "%s: L0 is %.1f on this corpus, not %g as declared; is it the right site and normalisation?",
                source.name,
                measured["l0_measured"],
                declared,
            )
    return measured


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
