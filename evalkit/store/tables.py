"""The tables of ``records.sqlite``: their layout, and the keys and rows that pass through ``RunStore``.

Knows SQL text and row types only; opens no file.
"""

from __future__ import annotations

from typing import NamedTuple

from evalkit.records import FeatureId
from evalkit.util.sealed_rows import CHECKSUMS

__all__ = ["LAYOUT", "NEW_TABLES", "SCORE_KEY", "TABLES", "UNVERIFIED_LAYOUT", "FeatureRow", "ScoreKey"]

# Version of a run folder, of its tables and of its checksums; raised with every change to them. A folder of the version
# before has the same tables without those of ``NEW_TABLES``, and files without checksums.
LAYOUT = 3
UNVERIFIED_LAYOUT = 2
TABLES = """
CREATE TABLE IF NOT EXISTS sources (
    position INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, kind TEXT NOT NULL, site TEXT NOT NULL,
    width INTEGER, l0 REAL, depth INTEGER, measured TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS features (
    source TEXT NOT NULL, feature TEXT NOT NULL, position INTEGER NOT NULL, status TEXT NOT NULL, reason TEXT,
    density REAL, threshold REAL, peak REAL, explain_peak REAL, window_share REAL, promoted TEXT NOT NULL,
    PRIMARY KEY (source, feature));
CREATE TABLE IF NOT EXISTS explanations (
    source TEXT NOT NULL, feature TEXT NOT NULL, explainer TEXT NOT NULL, version TEXT NOT NULL, text TEXT,
    reason TEXT, note TEXT NOT NULL, PRIMARY KEY (source, feature, explainer));
CREATE TABLE IF NOT EXISTS scores (
    source TEXT NOT NULL, feature TEXT NOT NULL, scorer TEXT NOT NULL, explainer TEXT NOT NULL, judge TEXT NOT NULL,
    control TEXT NOT NULL, repeat INTEGER NOT NULL, version TEXT NOT NULL, judge_version TEXT NOT NULL, cutoff REAL,
    reason TEXT, PRIMARY KEY (source, feature, scorer, explainer, judge, control, repeat));
CREATE TABLE IF NOT EXISTS judgements (
    source TEXT NOT NULL, feature TEXT NOT NULL, scorer TEXT NOT NULL, explainer TEXT NOT NULL, judge TEXT NOT NULL,
    control TEXT NOT NULL, repeat INTEGER NOT NULL, item INTEGER NOT NULL, window INTEGER NOT NULL, label INTEGER NOT NULL,
    match INTEGER, confidence REAL, probability REAL, decile INTEGER, reason TEXT, moments TEXT,
    PRIMARY KEY (source, feature, scorer, explainer, judge, control, repeat, item)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS asked (
    model TEXT PRIMARY KEY, calls INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    cost REAL, estimate TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS stages (name TEXT PRIMARY KEY, seconds REAL NOT NULL, detail TEXT NOT NULL);
"""
# ``stage_seconds``: a second copy instead of a checksum, because runs that are equal otherwise differ in them.
NEW_TABLES = f"""
CREATE TABLE IF NOT EXISTS stage_seconds (name TEXT PRIMARY KEY, seconds REAL NOT NULL);
{CHECKSUMS};
"""

ScoreKey = tuple[str, str, str, str, str, str, int]  # source, feature, scorer, explainer, judge, control, repeat
SCORE_KEY = "source, feature, scorer, explainer, judge, control, repeat"


class FeatureRow(NamedTuple):
    """A row of the table ``features``.

    position: in the order of selection
    status: "ok", or "ineligible" with a ``reason``
    density: share of unmasked tokens on which the feature is active
    peak: largest activation in the corpus
    explain_peak: largest activation in a window of the explain pool
    window_share: share of windows of the score pool in which it is active, None if unknown
    promoted: see ``ExplainExamples``
    """

    source: str
    feature: FeatureId
    position: int
    status: str
    reason: str | None
    density: float
    threshold: float
    peak: float
    explain_peak: float
    window_share: float | None = None
    promoted: tuple[str, ...] = ()
