"""The table of a run: one row per dictionary × scorer × explainer × judge × metric.

Knows nothing of file formats (see ``evalkit.report.render``) or the terminal. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evalkit.report.rows import Row, Setup, is_baseline, score_rows
from evalkit.stats.standard_errors import macro_mean, paired_difference
from evalkit.store.frames import RunFrames

__all__ = ["TABLE_COLUMNS", "headline", "headline_rows", "summary_table"]

TABLE_COLUMNS = (
    *("dictionary", "kind", "width", "l0", "depth", "scorer", "explainer", "judge", "metric"),
    *("n_tried", "n_ineligible", "n_features", "n_judgements", "n_unscored"),
    *("mean", "se", "ci_low", "ci_high", "null_mean", "null_se", "z"),
)
_BESIDE = "balanced acc."  # the last column of a headline; without null and z if there is another metric
_HEADLINE = {"auroc": "AUROC", "accuracy": "accuracy", "pearson": "Pearson r", "balanced_accuracy": _BESIDE}
_DTYPES = {"width": "Int64", "l0": "float64", "depth": "Int64"} | dict.fromkeys(
    ("mean", "se", "ci_low", "ci_high", "null_mean", "null_se", "z"), "float64"
)


def summary_table(frames: RunFrames, metrics: tuple[str, ...] | None = None) -> pd.DataFrame:
    """One row per dictionary × scorer × explainer × judge × metric (see ``score_rows``), with ``TABLE_COLUMNS``.

    n_tried: number of features tried.
    n_ineligible: number of these without a judgement in this row (too few examples, or an error).
    n_features: number of features with a score; the others had judgements of one class only, or none that the metric uses.
    n_judgements: number of judgements with the features' own explanations.
    n_unscored: number of these that lack the value the metric needs.
    mean, se, ci_low, ci_high: over features, two-way clustered by feature and window.
    null_mean, null_se: the same with another feature's explanation.
    z: the mean paired difference real − shuffled, divided by its own clustered error; infinite if that error is exactly 0.

    Raises InputError if the frames are empty or inconsistent.
    """
    table = pd.DataFrame([_cells(row) for row in score_rows(frames, metrics)], columns=list(TABLE_COLUMNS))
    return table.astype(_DTYPES)


def _cells(row: Row) -> dict[str, Any]:
    real, shuffled = macro_mean(row.real), macro_mean(row.shuffled)
    return {
        "dictionary": row.source.name,
        "kind": row.source.kind,
        "width": row.source.width,
        "l0": row.source.l0,
        "depth": row.source.depth,
        "scorer": row.scorer,
        "explainer": row.explainer,
        "judge": row.judge,
        "metric": row.metric,
        "n_tried": row.source.n_tried,
        "n_ineligible": row.source.n_tried - row.n_judged,
        "n_features": real.n,
        "n_judgements": row.n_judgements,
        "n_unscored": row.real.n_unscored,
        "mean": real.mean,
        "se": real.se,
        "ci_low": real.low,
        "ci_high": real.high,
        "null_mean": shuffled.mean,
        "null_se": shuffled.se,
        "z": paired_difference(row.real, row.shuffled).z,
    }


def headline_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``table`` that get their own line in its headline: all but lexical baselines of other judges."""
    return table[_has_a_line(table)]


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The short table: one row per dictionary and scorer, with "mean ± se" of AUROC or of the scorer's own metric.

    Further columns are the shuffled null, z, the lexical baseline if it was run, and balanced accuracy. Explainer, judge
    and metric get columns only if there are several of them.
    """
    lined = _has_a_line(table)
    rows, others = table[lined], table[~lined]
    keys = ["dictionary", "scorer"] + [name for name in ("explainer", "judge") if rows[name].nunique() > 1]
    firsts = {_HEADLINE[metric] for metric in rows["metric"].unique()}
    firsts = firsts - {_BESIDE} or firsts
    lexical = {_place(row): _plus_minus(row["mean"], row["se"]) for row in others.to_dict("records")}
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows.to_dict("records"):
        key = tuple(str(row[name]) for name in keys)
        line = lines.setdefault(key, dict(zip(keys, key, strict=True)))
        line.setdefault("features", f"{row['n_features']}/{row['n_tried']}")
        title = _HEADLINE[str(row["metric"])]
        if title not in firsts:
            line[title] = _plus_minus(row["mean"], row["se"])
            continue
        if len(firsts) > 1:
            if "metric" in line:  # the scorer already has a line for another metric
                line = lines.setdefault(
                    (*key, title), {**dict(zip(keys, key, strict=True)), "features": line["features"]}
                )
            line["metric"], title = title, "score"
        line[title] = _plus_minus(row["mean"], row["se"])
        line[f"{title} null"] = _plus_minus(row["null_mean"], row["null_se"])
        line[f"{title} z"] = "–" if pd.isna(row["z"]) else f"{row['z']:.1f}"
        if found := lexical.get(_place(row)):
            line[f"{title} lexical"] = found
    there = {name for line in lines.values() for name in line}
    titles = ("score", *(title for title in _HEADLINE.values() if title in firsts))
    columns = [f"{title}{part}" for title in titles for part in ("", " null", " z", " lexical")]
    columns = [*keys, "features", "metric", *columns, *([] if _BESIDE in firsts else [_BESIDE])]
    return pd.DataFrame(list(lines.values()), columns=[name for name in columns if name in there]).fillna("–")


def _has_a_line(table: pd.DataFrame) -> NDArray[np.bool_]:
    setups: list[Setup] = list(zip(table["scorer"], table["explainer"], table["judge"], strict=True))
    every = set(setups)
    beside = np.array([is_baseline(setup, every) for setup in setups], dtype=np.bool_)
    return table["metric"].isin(_HEADLINE).to_numpy() & ~beside


def _place(row: Mapping[Hashable, Any]) -> tuple[str, ...]:
    return str(row["dictionary"]), str(row["scorer"]), str(row["metric"])


def _plus_minus(mean: Any, se: Any) -> str:
    if pd.isna(mean):
        return "–"
    return f"{mean:.3f}" if pd.isna(se) else f"{mean:.3f} ± {se:.3f}"
