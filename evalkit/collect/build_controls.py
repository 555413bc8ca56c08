"""Builds the controls of a run: dictionaries that carry no learned meaning, matched to one of the real ones.

Deterministic given the calibration sample. Knows the selected features of the run and the control sources; knows nothing
of explainers and judges. Reads and writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from evalkit.collect.activations import SelectedFeatures
from evalkit.collect.calibration import Calibration, sample_activations, top_share_threshold
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig
from evalkit.seeds import derive, hash_priorities
from evalkit.sources.controls import PermutedSource, PlantedSource, RandomDirectionsSource
from evalkit.sources.rqae.source import RqaeSource, random_codes_source

if TYPE_CHECKING:
    from evalkit.protocols import FeatureSource
    from evalkit.records import FeatureId, SubjectInfo

__all__ = ["build_controls", "reference_of"]

_LOG = logging.getLogger(__name__)


def build_controls(
    config: RunConfig,
    selected: Sequence[SelectedFeatures],
    calibration: Calibration,
    token_text: Callable[[int], str],
    subject: SubjectInfo,
) -> list[SelectedFeatures]:
    """The controls that ``config`` asks for, matched to the dictionaries in ``selected``.

    ``token_text`` returns the text of a token id. A control that cannot be built is left out with a warning. Raises
    BadConfig where a dictionary has the name of a control.
    """
    deepest = _deepest_rqae(selected)
    wanted = config.control_dictionaries(has_rqae=deepest is not None)
    controls = []
    if reference := reference_of(selected):
        controls += _matched_controls(config, wanted, reference, calibration, token_text, subject)
    if deepest is not None and "random-codes" in wanted:
        controls.append(_random_codes(config, deepest, calibration))
    _check_names(selected, controls)
    return controls


def _check_names(selected: Sequence[SelectedFeatures], controls: Sequence[SelectedFeatures]) -> None:
    taken = {one.source.name for one in selected}
    for control in controls:
        if (name := control.source.name) in taken:
            raise BadConfig(
                name,
                expected="a dictionary with another name than the control of this run",
                seen="a dictionary and a control of this name",
                fix="give the dictionary another name in its card.json, or leave the control out of --controls",
            )


def reference_of(selected: Sequence[SelectedFeatures]) -> SelectedFeatures | None:
    """The dictionary that controls are matched to: the SAE of median L0 among those of the most common width.

    Without an SAE, the first dictionary that has features; None if none has.
    """
    saes = [one for one in selected if one.source.info.kind != "rqae" and one.features]
    if not saes:
        return next((one for one in selected if one.features), None)
    widths = [one.source.info.width or 0 for one in saes]
    common = max(sorted(set(widths)), key=widths.count)
    group = [one for one in saes if one.source.info.width == common] or saes
    group.sort(key=lambda one: (one.source.info.l0 or 0.0, one.source.name))
    return group[len(group) // 2]


def _matched_controls(
    config: RunConfig,
    wanted: Sequence[str],
    reference: SelectedFeatures,
    calibration: Calibration,
    token_text: Callable[[int], str],
    subject: SubjectInfo,
) -> list[SelectedFeatures]:
    source, features = reference.source, reference.features
    thresholds = torch.tensor([source.threshold(feature) for feature in features])
    excess = (sample_activations(source, features, calibration) - thresholds).clamp(min=0)
    note = {"matched_to": source.name}
    controls: list[FeatureSource] = []
    if "random-directions" in wanted:
        densities = (excess > 0).float().mean(dim=0).tolist()
        random = RandomDirectionsSource(
            source.site, subject.d_model, len(features), float(np.mean(densities)), derive(config.seed, "random")
        )
        values = sample_activations(random, random.features(), calibration)
        matched = dict(zip(random.features(), top_share_threshold(values, densities), strict=True))
        controls.append(random.with_thresholds(matched))
    if "planted" in wanted:
        if groups := _planted_groups(config, calibration, token_text):
            controls.append(PlantedSource(source.site, groups))
        else:
            _LOG.warning("no planted control: the corpus has no word of one token that is frequent enough")
    if "permuted" in wanted:
        controls.append(
            PermutedSource(
                source.site, excess, features, derive(config.seed, "permuted"), calibration.corpus.context_length
            )
        )
    return [
        SelectedFeatures(control, tuple(control.features()), {} if isinstance(control, PlantedSource) else note, True)
        for control in controls
    ]


def _planted_groups(
    config: RunConfig, calibration: Calibration, token_text: Callable[[int], str]
) -> dict[FeatureId, tuple[int, ...]]:
    """Single-token words that are neither rare nor common, drawn by hash from the calibration sample.

    A group holds all token ids of one word (with and without the leading space). Words of at least five letters that are
    expected in three times the windows a test needs come first; then those of four letters; then those expected in twice
    the windows. A word is too common above 0.3% of tokens and above thirty times the frequency a test needs.
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


def _deepest_rqae(selected: Sequence[SelectedFeatures]) -> RqaeSource | None:
    found = [one.source for one in selected if isinstance(one.source, RqaeSource)]
    return max(found, key=lambda source: source.depth, default=None)


def _random_codes(config: RunConfig, source: RqaeSource, calibration: Calibration) -> SelectedFeatures:
    """As many features as the RQAE has, made from random codes and active on the same share of tokens."""
    null = random_codes_source(source, len(source.features()), derive(config.seed, "random codes"))
    values = sample_activations(null, null.features(), calibration)
    thresholds = top_share_threshold(values, [source.density] * len(null.features()))
    null = null.with_thresholds(dict(zip(null.features(), thresholds, strict=True)))
    return SelectedFeatures(null, tuple(null.features()), {"matched_to": source.name}, True)
