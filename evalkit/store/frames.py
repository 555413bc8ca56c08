"""The records of a run as data frames, the only form in which tables, plots and exports see a run.

Checks that the frames are consistent. Does not know how a run is stored (``evalkit.store.run_store.read_run`` creates these
frames), what a scorer or judge is, or any statistics. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from evalkit.errors import InputError

__all__ = ["COLUMNS", "RunFrames", "check_frames"]

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
        {"judge calls": 4000, "USD": 0.12}). Other keys are ignored here.
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
