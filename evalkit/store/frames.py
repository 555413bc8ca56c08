"""The records of a run as data frames, the only form in which tables, plots and exports see a run.

Makes them from rows of the tables, and checks that frames fit together. Opens no file (``evalkit.store.run_store.read_run``
does), and does not know what a scorer or judge is, or any statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from evalkit.errors import InputError
from evalkit.records import BASELINE

__all__ = [
    "COLUMNS",
    "RunFrames",
    "check_frames",
    "explanations_frame",
    "features_frame",
    "judgements_frame",
    "sources_frame",
]

COLUMNS: dict[str, tuple[str, ...]] = {
    "sources": ("name", "kind", "site", "width", "l0", "depth"),
    "features": ("source", "feature", "density", "window_share", "status", "reason"),
    "judgements": (
        *("source", "feature", "scorer", "scorer_version", "explainer", "judge", "control", "repeat", "item", "window"),
        *("label", "match", "confidence", "probability", "decile", "reason", "moments"),
    ),
}
_KEYS: dict[str, list[str]] = {
    "sources": ["name"],
    "features": ["source", "feature"],
    "judgements": ["source", "feature", "scorer", "scorer_version", "explainer", "judge", "control", "repeat", "item"],
}


@dataclass(frozen=True, slots=True, eq=False)
class RunFrames:
    """A run's records. Row order has no meaning; other columns are ignored; nullable columns may hold None, NaN or NA.

    sources
        name (unique), kind ("rqae", "sae", "null-…"), site, width (nullable), l0 (nullable, active features per token),
        depth (nullable, RQAE layers used)
    features
        one row per feature that was tried: source, feature (unique within its source), density (share of tokens on
        which it is active, nullable), window_share (the same of windows, nullable), status ("ok", "ineligible" or
        "failed"), reason (nullable)
    judgements
        source, feature, scorer, scorer_version, explainer, judge, control ("" for the feature's own explanation,
        "shuffled" for another feature's), repeat (number of the repeat of the same test, from 0), item (unique within the
        columns before it), window (grid window id), label (bool), match (nullable bool: None is unscored), confidence
        (nullable), probability (nullable), decile (nullable, 0–9), reason (nullable, why unscored), moments (nullable: a
        ``Judgement``'s moments as a JSON list, for predicted activations)
    explanations
        source, feature, explainer, version, text (None if it failed), reason; tables and plots do not use it
    meta
        what footers print, all optional: ``protocol`` (its version), ``cost`` (a sentence, or a mapping such as
        {"judge calls": 4000, "USD": 0.12}), ``verified`` (False for records without checksums). Other keys are ignored
        here.
    """

    sources: pd.DataFrame
    features: pd.DataFrame
    judgements: pd.DataFrame
    meta: Mapping[str, Any] = field(default_factory=dict)
    explanations: pd.DataFrame = field(default_factory=pd.DataFrame)


def check_frames(frames: RunFrames) -> None:
    """Raise InputError unless every frame has its columns once, keys are unique, and every name used is declared."""
    for name in COLUMNS:
        _check_columns(name, getattr(frames, name))
    if frames.sources.empty or frames.features.empty or frames.judgements.empty:
        empty = ", ".join(name for name in COLUMNS if getattr(frames, name).empty)
        raise InputError(
            "run",
            expected="sources, features and judgements",
            seen=f"no {empty}",
            fix="let `evalkit run` finish first",
        )
    for name, keys in _KEYS.items():
        _check_unique(name, getattr(frames, name), keys)
    _check_declared("features", frames.features, ["source"], "sources", frames.sources, ["name"])
    tried = ["source", "feature"]
    _check_declared("judgements", frames.judgements, tried, "features", frames.features, tried)


Rows = Sequence[Sequence[Any]]


def sources_frame(rows: Rows) -> pd.DataFrame:
    """The frame ``sources`` from rows of the table."""
    names = ["position", "name", "kind", "site", "width", "l0", "depth", "measured"]
    frame = pd.DataFrame(rows, columns=names).drop(columns="position")
    return frame.astype({"width": "Int64", "depth": "Int64", "l0": "float64"})


def explanations_frame(rows: Rows) -> pd.DataFrame:
    """The frame ``explanations`` from rows of the table."""
    return pd.DataFrame(rows, columns=["source", "feature", "explainer", "version", "text", "reason", "note"])


def features_frame(rows: Rows, explanations: Rows, scores: Rows) -> pd.DataFrame:
    """The frame ``features`` from rows of the three tables.

    An eligible feature is "failed" if an explanation or a score of it failed and no score succeeded. Scores of the lexical
    baseline count only against failures of the baseline: it never calls a model, so it succeeds where the others fail.
    """
    failures: dict[tuple[str, str, bool], list[str]] = {}
    for row in explanations:
        if row[4] is None:
            failures.setdefault((row[0], row[1], row[2] == BASELINE[0]), []).append(row[5])
    succeeded = set[tuple[str, str, bool]]()
    for row in scores:
        key = (row[0], row[1], (row[3], row[4]) == BASELINE)
        if row[10] is None:
            succeeded.add(key)
        else:
            failures.setdefault(key, []).append(row[10])
    found = []
    for source, feature, position, status, reason, density, threshold, peak, _, share, _ in rows:
        reasons = list[str]()
        if (source, feature, False) not in succeeded:
            reasons += failures.get((source, feature, False), [])
            if (source, feature, True) not in succeeded:
                reasons += failures.get((source, feature, True), [])
        told = ("failed", min(reasons)) if reasons else (status, reason)
        found.append((source, feature, position, density, threshold, peak, share, *told))
    frame = pd.DataFrame(
        found,
        columns=[
            *("source", "feature", "position", "density", "threshold", "peak", "window_share", "status", "reason"),
        ],
    )
    return frame.astype(dict.fromkeys(("density", "threshold", "peak", "window_share"), "float64"))


def judgements_frame(scores: Iterable[tuple[Sequence[Any], Sequence[Sequence[Any]]]]) -> pd.DataFrame:
    """The frame ``judgements`` from rows of the records: every score with its judgements."""
    rows = [(*row, score[7], score[8]) for score, judged in scores for row in judged]
    frame = pd.DataFrame(
        rows,
        columns=[
            *("source", "feature", "scorer", "explainer", "judge", "control", "repeat", "item", "window", "label"),
            *("match", "confidence", "probability", "decile", "reason", "moments", "scorer_version", "judge_version"),
        ],
    )
    frame["label"] = frame["label"].astype(bool)
    frame["match"] = frame["match"].astype("boolean")
    for column in ("confidence", "probability"):
        frame[column] = frame[column].astype("float64")
    frame["decile"] = frame["decile"].astype("Int64")
    return frame


def _check_columns(name: str, frame: pd.DataFrame) -> None:
    found = list(frame.columns)
    missing = [column for column in COLUMNS[name] if column not in found]
    if missing:
        raise InputError(
            f"frame {name}",
            expected=f"columns {', '.join(COLUMNS[name])}",
            seen=f"no {', '.join(missing)}",
            fix="read the run with evalkit.read_run",
        )
    twice = sorted({column for column in COLUMNS[name] if found.count(column) > 1})
    if twice:
        raise InputError(
            f"frame {name}",
            expected="every column once",
            seen=f"{', '.join(twice)} more than once",
            fix="read the run with evalkit.read_run",
        )


def _check_unique(name: str, frame: pd.DataFrame, keys: list[str]) -> None:
    twice = frame.duplicated(keys)
    if twice.any():
        first = frame.loc[twice, keys].iloc[0]
        raise InputError(
            f"frame {name}",
            expected=f"one row per {', '.join(keys)}",
            seen=f"{int(twice.sum())} repeated, such as {', '.join(str(value) for value in first)}",
            fix="drop the repeated rows, which would count one observation twice",
        )


def _check_declared(
    name: str, frame: pd.DataFrame, keys: list[str], other: str, declared: pd.DataFrame, other_keys: list[str]
) -> None:
    used = pd.MultiIndex.from_frame(frame[keys].drop_duplicates())
    unknown = used.difference(pd.MultiIndex.from_frame(declared[other_keys]))
    if len(unknown):
        raise InputError(
            f"frame {name}",
            expected=f"{' and '.join(keys)} that the frame {other} lists",
            seen=f"{len(unknown)} others, such as {', '.join(str(value) for value in unknown[0])}",
            fix="read the run with evalkit.read_run",
        )
