"""The tables of ``records.sqlite``: their layout, and the keys and rows that pass through ``RunStore``.

Knows SQL text and row types only; opens no file.
"""

from __future__ import annotations

from typing import NamedTuple

from evalkit.records import BASELINE, FeatureId

__all__ = ["FEATURES_QUERY", "LAYOUT", "SCORE_KEY", "TABLES", "FeatureRow", "ScoreKey"]

LAYOUT = 2  # version of the tables; raised with every change to them
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

# An eligible feature is "failed" if an explanation or a score of it failed and no score succeeded. Scores of the lexical
# baseline count only against failures of the baseline: it never calls a model, so it succeeds where the others fail.
FEATURES_QUERY = f"""
WITH failures AS (
    SELECT source, feature, reason, explainer = '{BASELINE[0]}' AS baseline FROM explanations WHERE text IS NULL
    UNION ALL SELECT source, feature, reason, (explainer, judge) = {BASELINE} FROM scores WHERE reason IS NOT NULL)
SELECT source, feature, position, density, threshold, peak, window_share,
    CASE WHEN failed IS NULL THEN status ELSE 'failed' END AS status, coalesce(failed, reason) AS reason
FROM (SELECT f.*, (SELECT min(x.reason) FROM failures x WHERE x.source = f.source AND x.feature = f.feature
        AND NOT EXISTS (SELECT 1 FROM scores s WHERE s.source = f.source AND s.feature = f.feature AND s.reason IS NULL
            AND (x.baseline OR (s.explainer, s.judge) <> {BASELINE}))
    ) AS failed FROM features f)
ORDER BY source, position
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
