"""Selects the features of each dictionary that a run scores.

Deterministic given the calibration sample, so a resumed run selects the same features. Knows sources only through their
contracts. Reads and writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.collect.activations import SelectedFeatures
from evalkit.collect.calibration import Calibration, Centre, sample_activations, top_share_threshold
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, CorpusError, UnknownFeature
from evalkit.protocols import CalibratedSource, CentredSource, FeatureSource
from evalkit.records import FeatureId
from evalkit.seeds import derive, hash_priorities

__all__ = ["select_features"]

_LOG = logging.getLogger(__name__)
_CANDIDATES = 64  # features tested at a time for firing on the sample


def select_features(
    config: RunConfig,
    sources: Sequence[FeatureSource],
    calibration: Calibration,
    centres: Sequence[Centre],
    measured: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[SelectedFeatures]:
    """The scored features of every dictionary, in the order of ``sources``.

    sources: bound to the subject model
    centres: the token occurrences that RQAE features are made from
    measured: results of the fit check, by source name; they are kept with the features

    Raises BadConfig (two sources of one name), UnknownFeature, CorpusError (no feature fires).
    """
    _check_names(sources)
    found = measured or {}
    return [_select(config, source, calibration, centres, dict(found.get(source.name, {}))) for source in sources]


def _check_names(sources: Sequence[FeatureSource]) -> None:
    seen: set[str] = set()
    for source in sources:
        if source.name in seen:
            raise BadConfig(
                source.name,
                expected="a different name for every dictionary",
                seen="two dictionaries of this name",
                fix="pass each dictionary once, or give one another name in its card.json",
            )
        seen.add(source.name)


def _select(
    config: RunConfig,
    source: FeatureSource,
    calibration: Calibration,
    centres: Sequence[Centre],
    measured: dict[str, Any],
) -> SelectedFeatures:
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
        values = sample_activations(source, chosen, calibration)
        thresholds = top_share_threshold(values, [source.density] * len(chosen))
        source = source.with_thresholds(dict(zip(chosen, thresholds, strict=True)))
    return SelectedFeatures(source, tuple(chosen), measured)


def _check_ids(source: FeatureSource, chosen: Sequence[FeatureId]) -> None:
    known = source.features()
    for feature in chosen:
        if feature not in known:
            raise UnknownFeature(
                f"feature {feature!r} of {source.name}",
                expected=f"one of its {len(known)} features, such as {', '.join(known[:3])}",
                seen=repr(feature),
                fix="name other ids in --features, or score this dictionary in a separate run",
            )


def _in_hashed_order(source: FeatureSource, seed: int) -> _Ordered:
    ids = source.features()
    return _Ordered(ids, np.argsort(hash_priorities(derive(seed, "features", source.name), np.arange(len(ids)))))


@dataclass(frozen=True, slots=True)
class _Ordered:
    """Ids in another order, without building a list of millions of ids."""

    ids: Sequence[FeatureId]
    order: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, part: slice) -> list[FeatureId]:
        return [self.ids[int(index)] for index in self.order[part]]


def _choose_alive(source: FeatureSource, config: RunConfig, calibration: Calibration) -> tuple[list[FeatureId], float]:
    """Features in hashed order, keeping those that fire on the calibration sample, until there are enough.

    With a density band, keeps those whose density on the sample lies in it. Also returns the share of tested features that
    were kept.
    """
    ids = _in_hashed_order(source, config.seed)
    low, high = config.density_band or (0.0, 1.0)
    chosen: list[FeatureId] = []
    tested = 0
    for first in range(0, len(ids), _CANDIDATES):
        candidates = ids[first : first + _CANDIDATES]
        densities = (sample_activations(source, candidates, calibration) > 0).double().mean(dim=0).tolist()
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
