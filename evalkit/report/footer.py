"""The footer of a run's table: the origin and the limits of its numbers, and all warnings that apply.

Knows nothing of file formats. Reads and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from evalkit.config.presets import find_preset
from evalkit.records import NO_EXPLAINER
from evalkit.report.rows import Row, score_rows, sorted_sources
from evalkit.report.small_model_marks import notes
from evalkit.stats.standard_errors import macro_mean
from evalkit.stats.variance import features_needed, spread_of
from evalkit.store.frames import RunFrames

__all__ = ["footer"]

SURE = 0.975  # one-sided confidence level at which a row must be above its shuffled null
MUCH_UNSCORED = 0.05  # share of unscored judgements above which the footer warns
APART = 0.02  # difference between two dictionaries for which the footer gives the number of features needed


def footer(frames: RunFrames, table: pd.DataFrame) -> list[str]:
    """The lines below the table: what was run, what the errors include, and all warnings that apply."""
    lines = [_provenance(frames, table)]
    if frames.meta.get("verified") is False:
        lines.append(
            "Unverified: written by an earlier version, without checksums, so damage would go unnoticed; `evalkit run` "
            "with the options of this run adds them."
        )
    lines += notes([*table["explainer"], *table["judge"]])
    if (preset := find_preset(frames.meta.get("preset"))) is not None:
        lines.append(f"Preset {frames.meta['preset']}: {preset.wrong}")
    lines.append("SE: two-way clustered by feature and window; it does not contain the spread between training seeds.")
    if table["scorer"].str.match(r"intruder\b").any():
        lines.append("Chance of intruder: one in as many texts as a question shows (n_texts, by default five).")
    lines += [*_caveats(frames), *_survivorship(frames, table), *_precision(frames)]
    share = table["n_unscored"] / table["n_judgements"].where(table["n_judgements"] > 0)
    if (much := table.loc[share > MUCH_UNSCORED]).size:
        worst = float(share.max())
        lines.append(f"More than 5% of judgements unscored (up to {worst:.1%}): {_name_rows(much)}.")
    real = table["null_mean"].notna() & (table["n_features"] > 0)
    least = stats.t.ppf(SURE, np.maximum(table["n_features"] - 1, 1))
    if (beaten := table.loc[real & ~(table["z"] >= least)]).size:
        lines.append(f"Does not beat its shuffled null (paired t test, {SURE:.1%}): {_name_rows(beaten)}.")
    explained = table["explainer"] != NO_EXPLAINER
    if (alone := table.loc[table["null_mean"].isna() & (table["n_features"] > 0) & explained]).size:
        lines.append(f"No shuffled null was run: {_name_rows(alone)}.")
    return lines


def _precision(frames: RunFrames) -> list[str]:
    """The number of features that a comparison needs and, if questions were repeated, the sources of variance."""
    alone = replace(frames, meta={**frames.meta, "preset": None})  # without pooling, which gives all features one score
    rows = [row for row in score_rows(alone, ("auroc",)) if not row.source.is_null and not row.source.matched]
    needed: dict[str, list[int]] = {}
    shares: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        spread, mean = spread_of(row.real), macro_mean(row.real)
        if spread is None or not spread.total:
            continue
        needed.setdefault(_asked(row, rows), []).append(features_needed(mean.n * mean.se**2, APART))
        if spread.judge is not None:
            parts = (spread.features, spread.examples, spread.judge)
            shares.setdefault(_asked(row, rows), []).append(tuple(part / spread.total for part in parts))
    lines = []
    if needed:
        told = ", ".join(f"{name} {int(np.median(counts)):,}" for name, counts in needed.items())
        lines.append(
            f"Features per dictionary needed to detect a difference of {APART} between two dictionaries (95% level, 80% "
            f"power; median over dictionaries): {told}."
        )
    for name, found in shares.items():
        features, examples, judge = np.mean(found, axis=0)
        lines.append(
            f"Variance of a feature's score, {name}: {features:.0%} between features, {examples:.0%} from the choice of "
            f"examples, {judge:.0%} from the judge's own noise."
        )
    return lines


def _asked(row: Row, rows: Sequence[Row]) -> str:
    """The scorer and metric, with the explainer or judge if the rows have several."""
    several = [one for place, one in enumerate(row.setup[1:], 1) if len({other.setup[place] for other in rows}) > 1]
    return f"{' · '.join([row.scorer, *several])} ({row.metric})"


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
    """A line for each dictionary that failed the fit check, or whose negatives are not verified to be inactive."""
    if "measured" not in frames.sources:
        return []
    lines = []
    for record in frames.sources.to_dict("records"):
        measured = json.loads(record["measured"]) if isinstance(record["measured"], str) else {}
        if refused := measured.get("fit_refused"):
            lines.append(f"FIT CHECK FAILED, scored because of --force: {record['name']}: {refused['seen']}.")
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
        lines.append(
            f"Some features have no score, because answers or one of the two classes are missing: {_name_rows(rows)}."
        )
    return lines


def _name_rows(rows: pd.DataFrame) -> str:
    """The rows as text: "sae-a detection (auroc, f1), fuzzing (auroc); sae-b detection (f1)"."""
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
