"""Computes the scores behind each row of a run's table from the run's frames.

A row is one dictionary × scorer × explainer × judge × metric. Decides what counts as tried, ineligible, unscored, real and
shuffled, and the order of the rows. Knows nothing of number formats and plots. Reads and writes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evalkit.config.presets import find_preset
from evalkit.errors import BadConfig
from evalkit.records import BASELINE, CONTROL_KIND, REAL, SHUFFLED
from evalkit.report.small_model_marks import labelled
from evalkit.stats.metrics import ALL_METRICS, METRICS, RANKING_METRICS, Scores, score_features
from evalkit.store.frames import RunFrames, check_frames

__all__ = ["Row", "Setup", "Source", "check_metric", "is_baseline", "score_rows", "sorted_sources"]

Setup: TypeAlias = tuple[str, str, str]  # scorer, explainer, judge

MATCHED = 5  # minimum number of density-matched features for a row of their own
_ORDER = ["source", "scorer", "explainer", "judge", "control", "feature", "repeat", "item"]


@dataclass(frozen=True, slots=True)
class Source:
    """The columns of a table that describe a dictionary.

    ``n_tried``: number of features tried.
    ``n_failed``: number of these that failed with an error.
    ``matched``: whether this is only the dictionary's density-matched selection: features about as dense as the RQAEs'.
    """

    name: str
    kind: str
    site: str
    width: int | None
    l0: float | None
    depth: int | None
    n_tried: int
    n_failed: int
    matched: bool = False

    @property
    def is_null(self) -> bool:
        """Whether the dictionary is a control."""
        return self.kind.startswith(CONTROL_KIND)

    @property
    def is_rqae(self) -> bool:
        """Whether the dictionary is an RQAE, read at one depth."""
        return self.kind == "rqae"


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The data behind one row.

    ``real``: scores with the features' own explanations.
    ``shuffled``: scores with other features' explanations.
    ``n_judgements``: number of judgements with the features' own explanations.
    ``n_positive``: number of these whose label is True.
    ``n_judged``: number of features with at least one of these judgements.
    """

    source: Source
    scorer: str
    explainer: str
    judge: str
    metric: str
    real: Scores
    shuffled: Scores
    n_judgements: int
    n_positive: int
    n_judged: int

    @property
    def setup(self) -> Setup:
        """Scorer, explainer and judge."""
        return (self.scorer, self.explainer, self.judge)


def sorted_sources(frames: RunFrames) -> list[Source]:
    """The dictionaries in the order of the table: RQAEs by depth, SAEs and others by width and L0, then controls."""
    tried = frames.features.groupby("source").size()
    failed = frames.features.loc[frames.features["status"] == "failed"].groupby("source").size()
    sources = [
        Source(
            name=str(record["name"]),
            kind=str(record["kind"]),
            site=str(record["site"]),
            width=None if pd.isna(record["width"]) else int(record["width"]),
            l0=None if pd.isna(record["l0"]) else float(record["l0"]),
            depth=None if pd.isna(record["depth"]) else int(record["depth"]),
            n_tried=int(tried.get(record["name"], 0)),
            n_failed=int(failed.get(record["name"], 0)),
        )
        for record in frames.sources.to_dict("records")
    ]
    return sorted(sources, key=_place)


def _place(source: Source) -> tuple[int, str, str, float, float, float, str]:
    group = 2 if source.is_null else 0 if source.is_rqae else 1
    sizes = [math.inf if size is None else float(size) for size in (source.depth, source.width, source.l0)]
    return (group, source.site, source.kind if group else "", sizes[0], sizes[1], sizes[2], source.name)


def score_rows(frames: RunFrames, metrics: tuple[str, ...] | None = None) -> Iterator[Row]:
    """Every row, in the order of the table.

    ``metrics``: by default those of the run's preset, or METRICS. Scorers whose tests have only one class get accuracy
        instead, and scorers that predict activations get pearson. Ranking metrics have rows only if some judgement of the
        scorer, explainer and judge has a confidence.

    A dictionary without any judgement from a scorer still gets that scorer's rows, empty, so that the gap is visible.
    Raises InputError if the frames are inconsistent, and BadConfig for an unknown metric.
    """
    preset = find_preset(frames.meta.get("preset"))
    pooled = preset is not None and preset.pooled
    metrics = metrics or (preset.metrics if preset else METRICS)
    for metric in metrics:
        check_metric(metric)
    check_frames(frames)
    judgements = frames.judgements.assign(
        scorer=_with_versions(frames.judgements, "scorer"),
        explainer=frames.judgements["explainer"].map(labelled),
        judge=_with_versions(frames.judgements.assign(judge=frames.judgements["judge"].map(labelled)), "judge"),
    )
    judgements = judgements.merge(frames.features[["source", "feature", "window_share"]], on=["source", "feature"])
    judgements = judgements.loc[judgements["control"].isin([REAL, SHUFFLED])].sort_values(_ORDER, kind="stable")
    groups = {_names(key): group for key, group in judgements.groupby(["source", "scorer", "explainer", "judge"])}
    setups = sorted({(key[1], key[2], key[3]) for key in groups})
    metrics_of = {setup: _metrics_of([groups[key] for key in groups if key[1:] == setup], metrics) for setup in setups}
    nothing = judgements.iloc[:0]
    sources = sorted_sources(frames)
    matched = _density_matched(frames, sources)
    for source in sources:
        for setup in _setups_of(source.name, setups, set(groups)):
            group = groups.get((source.name, *setup), nothing)
            for metric in metrics_of[setup]:
                yield _row(source, setup, metric, group, pooled=pooled)
        if source.name in matched:
            twin, features = matched[source.name]
            for setup in setups:
                chosen = groups.get((source.name, *setup), nothing)
                chosen = chosen.loc[chosen["feature"].isin(features)]
                for metric in metrics_of[setup] if len(chosen) else ():
                    yield _row(twin, setup, metric, chosen, pooled=pooled)


def _density_matched(frames: RunFrames, sources: Sequence[Source]) -> dict[str, tuple[Source, set[str]]]:
    """For a run with RQAEs, the density-matched features of the other dictionaries: (source to show, feature ids) by name.

    An RQAE's thresholds fix the density of its features, so each other dictionary also gets rows for its features with
    half to twice the median density of the RQAE features. Dictionaries where these are all features, or fewer than
    ``MATCHED``, are left out.
    """
    features = frames.features.loc[frames.features["status"] == "ok"]
    rqae = features.loc[features["source"].isin({source.name for source in sources if source.is_rqae}), "density"]
    found: dict[str, tuple[Source, set[str]]] = {}
    if rqae.dropna().empty:
        return found
    middle = float(rqae.median())
    for source in sources:
        mine = features.loc[features["source"] == source.name]
        chosen = mine.loc[mine["density"].between(middle / 2, 2 * middle), "feature"]
        if not source.is_rqae and not source.is_null and MATCHED <= len(chosen) < len(mine):
            name = f"{source.name} (density {middle / 2:.2%} to {2 * middle:.2%})"
            found[source.name] = (
                replace(source, name=name, n_tried=len(chosen), n_failed=0, matched=True),
                set(chosen),
            )
    return found


def is_baseline(setup: Setup, setups: Iterable[Setup]) -> bool:
    """Whether ``setup`` is the control "lexical" of a scorer that has other judges; it is shown next to their scores."""
    return setup[1:] == BASELINE and any(other[0] == setup[0] and other[2] != BASELINE[1] for other in setups)


def check_metric(metric: str) -> str:
    """Returns the metric. Raises BadConfig if it is unknown."""
    if metric not in ALL_METRICS:
        raise BadConfig(
            "metric", expected=f"one of {', '.join(ALL_METRICS)}", seen=repr(metric), fix="use one of these"
        )
    return metric


def _metrics_of(groups: Sequence[pd.DataFrame], wanted: Sequence[str]) -> tuple[str, ...]:
    """The wanted metrics that these judgements allow, or the single metric for their kind of test."""
    if any(group["moments"].notna().any() for group in groups):
        return ("pearson",)
    if len({label for group in groups for label in group["label"].unique()}) == 1:
        return ("accuracy",)
    ranked = any(group["confidence"].notna().any() for group in groups)
    return tuple(metric for metric in wanted if metric not in RANKING_METRICS or ranked)


def _setups_of(name: str, setups: list[Setup], seen: set[tuple[str, ...]]) -> list[Setup]:
    """The setups a dictionary has rows for: those with judgements, and all setups of a scorer that never judged it."""
    scorers = {scorer for source, scorer, *rest in seen if source == name and tuple(rest) != BASELINE}
    return [setup for setup in setups if (name, *setup) in seen or setup[0] not in scorers]


def _row(source: Source, setup: Setup, metric: str, group: pd.DataFrame, *, pooled: bool) -> Row:
    real, shuffled = (group.loc[group["control"] == control] for control in (REAL, SHUFFLED))
    return Row(
        source,
        *setup,
        metric=metric,
        real=_scores(metric, real, pooled=pooled),
        shuffled=_scores(metric, shuffled, pooled=pooled),
        n_judgements=len(real),
        n_positive=int(real["label"].sum()),
        n_judged=int(real["feature"].nunique()),
    )


def _scores(metric: str, judgements: pd.DataFrame, *, pooled: bool) -> Scores:
    return score_features(
        metric,
        feature=judgements["feature"].to_numpy(dtype=np.str_),
        window=judgements["window"].to_numpy(dtype=np.int64),
        label=judgements["label"].to_numpy(dtype=np.bool_),
        match=_nullable(judgements["match"].astype("boolean")),
        confidence=_nullable(judgements["confidence"]),
        base_rate=_nullable(judgements["window_share"]),
        moments=_moments(judgements["moments"]) if metric == "pearson" else None,
        pooled=pooled,
    )


def _moments(column: pd.Series[Any]) -> NDArray[np.float64]:
    """The moments (judgement, 6); NaN for a judgement without moments."""
    missing = [math.nan] * 6
    rows = [json.loads(text) if isinstance(text, str) else missing for text in column]
    return np.array(rows, np.float64).reshape(-1, 6)


def _nullable(column: pd.Series[Any]) -> NDArray[np.float64]:
    """The column as floats; missing values become NaN."""
    return np.asarray(column.astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan), np.float64)


def _with_versions(judgements: pd.DataFrame, part: str) -> pd.Series[str]:
    """The names of scorers or judges, with the version if a run holds several versions, whose scores must not be mixed."""
    column = f"{part}_version"
    named = judgements[part].astype(str)
    if column not in judgements:
        return named
    versions = judgements.groupby(part)[column].transform("nunique")
    return named.where(versions <= 1, named + "@" + judgements[column].astype(str))


def _names(key: Any) -> tuple[str, ...]:
    return tuple(str(part) for part in key)
