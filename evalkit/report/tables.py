"""The table of a run: one row per dictionary × scorer × explainer × judge × metric, and what must be said below it.

Knows no file formats (``evalkit.report.render`` has them) and no terminal. Reads and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from evalkit.report.frames import RunFrames
from evalkit.report.plumbing import notes
from evalkit.report.rows import Row, score_rows, sorted_sources
from evalkit.stats import macro_mean, paired_difference

__all__ = ["TABLE_COLUMNS", "footer", "headline", "summary_table"]

TABLE_COLUMNS = (
    *("dictionary", "kind", "width", "l0", "depth", "scorer", "explainer", "judge", "metric"),
    *("n_tried", "n_ineligible", "n_features", "n_judgements", "n_unscored"),
    *("mean", "se", "ci_low", "ci_high", "null_mean", "null_se", "z"),
)
_DTYPES = {"width": "Int64", "l0": "float64", "depth": "Int64"} | dict.fromkeys(
    ("mean", "se", "ci_low", "ci_high", "null_mean", "null_se", "z"), "float64"
)
SIGNIFICANT = 1.96  # z over the shuffled null that a row must reach
MUCH_UNSCORED = 0.05  # share of unscored judgements above which the footer says so


def summary_table(frames: RunFrames) -> pd.DataFrame:
    """One row per dictionary × scorer × explainer × judge × metric, with ``TABLE_COLUMNS``.

    n_tried: features tried. n_ineligible: those without a judgement in this row (too few examples, or failed).
    n_features: those with a score; the rest had one class only. n_judgements: items asked with the features' own
    explanations. n_unscored: those that lack what the metric needs. mean, se, ci_low, ci_high: over features, two-way
    clustered by feature and window. null_mean, null_se: the same under another feature's explanation. z: the mean
    paired difference real − shuffled over its own clustered error; infinite if that error is exactly zero.

    Raises InputError for frames that are empty or do not fit together.
    """
    table = pd.DataFrame([_cells(row) for row in score_rows(frames)], columns=list(TABLE_COLUMNS))
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


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The view for a terminal: one row per dictionary and scorer, AUROC and balanced accuracy as "mean ± se" text.

    Explainer and judge have columns only where there are several.
    """
    keys = ["dictionary", "scorer"] + [name for name in ("explainer", "judge") if table[name].nunique() > 1]
    shown = {"auroc": "AUROC", "balanced_accuracy": "balanced acc."}
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in table.to_dict("records"):
        key = tuple(str(row[name]) for name in keys)
        line = lines.setdefault(key, dict(zip(keys, key, strict=True)))
        line.setdefault("features", f"{row['n_features']}/{row['n_tried']}")
        if title := shown.get(str(row["metric"])):
            line[title] = _plus_minus(row["mean"], row["se"])
            line[f"{title} null"] = _plus_minus(row["null_mean"], row["null_se"])
            line[f"{title} z"] = "–" if pd.isna(row["z"]) else f"{row['z']:.1f}"
    columns = [*keys, "features", *(f"{title}{part}" for title in shown.values() for part in ("", " null", " z"))]
    found = {name for line in lines.values() for name in line}
    return pd.DataFrame(list(lines.values()), columns=[name for name in columns if name in found]).fillna("–")


def _plus_minus(mean: Any, se: Any) -> str:
    if pd.isna(mean):
        return "–"
    return f"{mean:.3f}" if pd.isna(se) else f"{mean:.3f} ± {se:.3f}"


def footer(frames: RunFrames, table: pd.DataFrame) -> list[str]:
    """The lines that belong below the table: what was run, what the errors hold, and every warning it has earned."""
    lines = [_provenance(frames, table), *notes([*table["explainer"], *table["judge"]])]
    lines.append("SE: two-way clustered by feature and window; it does not contain the spread between training seeds.")
    lines += _caveats(frames) + _survivorship(frames, table)
    share = table["n_unscored"] / table["n_judgements"].where(table["n_judgements"] > 0)
    if (much := table.loc[share > MUCH_UNSCORED]).size:
        worst = float(share.max())
        lines.append(f"More than 5% of judgements unscored (up to {worst:.1%}): {_name_rows(much)}.")
    real = table["null_mean"].notna() & (table["n_features"] > 0)
    if (beaten := table.loc[real & ~(table["z"] >= SIGNIFICANT)]).size:
        lines.append(f"Does not beat its shuffled null (z < {SIGNIFICANT}): {_name_rows(beaten)}.")
    if (alone := table.loc[table["null_mean"].isna() & (table["n_features"] > 0)]).size:
        lines.append(f"No shuffled null was run: {_name_rows(alone)}.")
    return lines


def _provenance(frames: RunFrames, table: pd.DataFrame) -> str:
    parts = [f"protocol {frames.meta.get('protocol', 'unknown')}"]
    for column in ("explainer", "judge"):
        parts.append(f"{column} {', '.join(_distinct(table[column]))}")
    cost = frames.meta.get("cost")
    if isinstance(cost, Mapping):
        cost = ", ".join(f"{name} {_amount(value)}" for name, value in cost.items())
    parts.append(f"cost: {cost if cost else 'not recorded'}")
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _amount(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if isinstance(value, float) else str(value)


def _caveats(frames: RunFrames) -> list[str]:
    """A line per dictionary that was scored although the fit check refused it, or whose negatives nobody verified."""
    if "measured" not in frames.sources:
        return []
    lines = []
    for record in frames.sources.to_dict("records"):
        measured = json.loads(record["measured"]) if isinstance(record["measured"], str) else {}
        if refused := measured.get("fit_refused"):
            lines.append(f"FIT CHECK FAILED, scored by --force: {record['name']}: {refused['seen']}.")
        if measured.get("negatives_unverified"):
            lines.append(f"Negatives are texts of other features, not verified to be inactive: {record['name']}.")
    return lines


def _survivorship(frames: RunFrames, table: pd.DataFrame) -> list[str]:
    lines = []
    failed = [f"{source.name} {source.n_failed}" for source in sorted_sources(frames) if source.n_failed]
    if failed:
        lines.append(f"Features that failed with an error, counted as ineligible: {', '.join(failed)}.")
    left_out = table["n_tried"] - table["n_ineligible"] - table["n_features"]
    if (rows := table.loc[left_out > 0]).size:
        lines.append(f"Some features have no score because only one class was scored: {_name_rows(rows)}.")
    return lines


def _name_rows(rows: pd.DataFrame) -> str:
    """Rows by name: "sae-a detection (auroc, f1), fuzzing (auroc); sae-b detection (f1)"."""
    several = [name for name in ("explainer", "judge") if rows[name].nunique() > 1]
    named: dict[str, dict[str, list[str]]] = {}
    for row in rows.to_dict("records"):
        setup = " ".join(str(row[name]) for name in ("scorer", *several))
        named.setdefault(str(row["dictionary"]), {}).setdefault(setup, []).append(str(row["metric"]))
    return "; ".join(
        f"{name} " + ", ".join(f"{setup} ({', '.join(metrics)})" for setup, metrics in setups.items())
        for name, setups in named.items()
    )


def _distinct(values: Iterable[Any]) -> list[str]:
    return sorted({str(value) for value in values})
