"""Differences between dictionaries, explainers or judges of a run, with standard errors and p-values.

Decides which rows of the run's table are compared and which of these pairs have the same features. Knows nothing of file
formats. Reads and writes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from evalkit.config.presets import find_preset
from evalkit.errors import BadConfig, InputError
from evalkit.report.rows import Row, Source, score_rows
from evalkit.stats.standard_errors import Estimate, difference
from evalkit.store.frames import RunFrames

__all__ = ["BETWEEN", "COMPARE_COLUMNS", "compare_notes", "compare_rows", "holm"]

COMPARE_COLUMNS = (
    *("between", "first", "second", "dictionary", "scorer", "explainer", "judge", "metric"),
    *("paired", "n_first", "n_second", "difference", "se", "ci_low", "ci_high", "p", "p_holm"),
)
_PART = {"dictionaries": "dictionary", "explainers": "explainer", "judges": "judge"}
BETWEEN = tuple(_PART)
SIGNIFICANT = 0.05  # adjusted p-value below which the notes count a difference


def compare_rows(
    frames: RunFrames,
    metric: str = "auroc",
    *,
    between: Sequence[str] = BETWEEN,
    baseline: str | None = None,
    controls: bool = False,
) -> pd.DataFrame:
    """One row per pair with ``COMPARE_COLUMNS``: first − second, its standard error, 95% interval and p-value.

    The two rows of a pair differ in exactly one of dictionary, explainer and judge. A pair is paired if both rows have the
    same features (from the same dictionary, or from RQAEs read at the same tokens); otherwise the test is Welch's.
    p is two-sided by Student's t; p_holm is Holm's, over all rows of this table.

    ``between``: what may differ within a pair, some of BETWEEN.
    ``baseline``: keep only pairs with the dictionary, explainer or judge of this name, and make it the second of the pair.
    ``controls``: include control dictionaries.

    Raises BadConfig for an unknown ``between`` or metric, and InputError if the frames are inconsistent or hold nothing to
    compare.
    """
    for name in between:
        if name not in BETWEEN:
            raise BadConfig("between", expected=f"some of {', '.join(BETWEEN)}", seen=repr(name), fix="use these names")
    rows = [row for row in score_rows(frames, (metric,)) if len(row.real.values)]
    rows = [row for row in rows if controls or not row.source.is_null]
    pairs = [
        (name, first, second)
        for name in BETWEEN
        if name in between
        for first, second in itertools.combinations(rows, 2)
        if _differ_only_in(_PART[name], first, second) and _alike(first.source, second.source)
    ]
    if baseline is not None:
        pairs = [_with_second(baseline, *pair) for pair in pairs if baseline in _names(*pair)]
    if not pairs:
        seen = ", ".join(dict.fromkeys(row.source.name for row in rows))
        raise InputError(
            "run",
            expected=f"two {' or '.join(between)}, "
            + (f"one of them {baseline!r}, " if baseline else "")
            + "with scores",
            seen=f"scores of {seen or 'nothing'}"[:400],
            fix="add scores to this run, or choose among these",
        )
    preset = find_preset(frames.meta.get("preset"))
    pooled = preset is not None and preset.pooled
    table = pd.DataFrame([_cells(*pair, pooled=pooled) for pair in pairs])
    table["p_holm"] = holm(table["p"].to_numpy(dtype=np.float64))
    return table[list(COMPARE_COLUMNS)]


def _parts(row: Row) -> dict[str, str]:
    return {"dictionary": row.source.name, "scorer": row.scorer, "explainer": row.explainer, "judge": row.judge}


def _differ_only_in(part: str, first: Row, second: Row) -> bool:
    a, b = _parts(first), _parts(second)
    return first.metric == second.metric and {name for name in a if a[name] != b[name]} == {part}


def _alike(first: Source, second: Source) -> bool:
    """Whether two dictionaries may be compared: a density-matched selection is compared with RQAEs only.

    The whole dictionary has its own rows for all other comparisons.
    """
    if not (first.matched or second.matched):
        return True
    return (first.is_rqae and second.matched) or (first.matched and second.is_rqae)


def _names(between: str, first: Row, second: Row) -> tuple[str, str]:
    return _parts(first)[_PART[between]], _parts(second)[_PART[between]]


def _with_second(baseline: str, between: str, first: Row, second: Row) -> tuple[str, Row, Row]:
    swap = _names(between, first, second)[0] == baseline
    return (between, second, first) if swap else (between, first, second)


def _paired(first: Row, second: Row, *, pooled: bool) -> bool:
    """Whether a pair is paired: the same dictionary, or two RQAEs, with at least two features in common.

    A pooled score belongs to all features of its row at once, so pooled rows need exactly the same features.
    """
    related = first.source.name == second.source.name or (first.source.is_rqae and second.source.is_rqae)
    common = np.intersect1d(first.real.features, second.real.features)
    if pooled:
        return related and len(common) == len(first.real.features) == len(second.real.features)
    return related and len(common) > 1


def _cells(between: str, first: Row, second: Row, *, pooled: bool) -> dict[str, Any]:
    paired = _paired(first, second, pooled=pooled)
    found = difference(first.real, second.real, paired=paired)
    names = _names(between, first, second)
    common = {name: None if name == _PART[between] else value for name, value in _parts(first).items()}
    n_first, n_second = (found.n, found.n) if paired else (len(first.real.values), len(second.real.values))
    return {
        "between": between,
        "first": names[0],
        "second": names[1],
        **common,
        "metric": first.metric,
        "paired": paired,
        "n_first": n_first,
        "n_second": n_second,
        "difference": found.mean,
        "se": found.se,
        "ci_low": found.low,
        "ci_high": found.high,
        "p": _p_value(found),
    }


def _p_value(found: Estimate) -> float:
    """The two-sided p-value; 1 if difference and standard error are both zero, NaN if the standard error is NaN."""
    if found.se == 0 and np.isnan(found.z):
        return 1.0
    return 2 * float(stats.t.sf(abs(found.z), found.df))


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's step-down adjustment of a family of p-values (p,); NaN stays NaN and is not part of the family.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics.
    """
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def compare_notes(table: pd.DataFrame) -> list[str]:
    """The notes below the table: how errors and p-values were computed, and how many differences are significant."""
    sure = int((table["p_holm"] < SIGNIFICANT).sum())
    return [
        "difference: first − second, mean over features. SE: if features are paired, two-way clustered by feature and "
        "window; otherwise the squared errors of both rows add up (Welch). It does not contain the spread between training "
        "seeds.",
        f"p: two-sided, Student's t. p_holm: Holm's over the {len(table)} rows of this table, {sure} of them below "
        f"{SIGNIFICANT}.",
    ]
