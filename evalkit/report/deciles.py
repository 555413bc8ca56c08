"""Scores by activation decile, to see whether explanations describe only the strong activations.

Each decile's positives are scored together with all negatives of the feature. Knows nothing of file formats. Reads and
writes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from evalkit.errors import InputError
from evalkit.report.rows import score_rows
from evalkit.stats.standard_errors import macro_mean
from evalkit.store.frames import RunFrames

__all__ = ["DECILE_COLUMNS", "decile_notes", "decile_table"]

DECILE_COLUMNS = (
    *("dictionary", "scorer", "explainer", "judge", "metric", "decile"),
    *("n_features", "n_judgements", "mean", "se", "ci_low", "ci_high"),
)


def decile_table(frames: RunFrames, metrics: tuple[str, ...] = ("auroc",)) -> pd.DataFrame:
    """One row for each row of the main table and each decile (0 weakest, 9 strongest), with ``DECILE_COLUMNS``.

    A decile is that of a window's peak among the feature's active windows. Negatives count in every decile, even those of
    fuzzing, which are active windows. n_judgements: number of positives in the decile. Raises InputError if no judgement
    has a decile.
    """
    positives = frames.judgements["label"].astype(bool)
    found: list[dict[str, Any]] = []
    deciles = sorted({int(decile) for decile in frames.judgements.loc[positives, "decile"].dropna()})
    if not deciles:
        raise InputError(
            "run",
            expected="judgements with activation deciles",
            seen="none",
            fix="collect the examples again with this version",
        )
    for decile in deciles:
        chosen = frames.judgements.loc[~positives | (frames.judgements["decile"] == decile).fillna(False)]
        for row in score_rows(replace(frames, judgements=chosen), metrics):
            if row.n_judgements and not row.n_positive:  # a scorer whose judgements have no deciles
                continue
            mean = macro_mean(row.real)
            found.append(
                {
                    "dictionary": row.source.name,
                    "scorer": row.scorer,
                    "explainer": row.explainer,
                    "judge": row.judge,
                    "metric": row.metric,
                    "decile": decile,
                    "n_features": mean.n,
                    "n_judgements": row.n_positive,
                    "mean": mean.mean,
                    "se": mean.se,
                    "ci_low": mean.low,
                    "ci_high": mean.high,
                }
            )
    table = pd.DataFrame(found, columns=list(DECILE_COLUMNS))
    order = {name: place for place, name in enumerate(dict.fromkeys(table["dictionary"]))}
    table["place"] = table["dictionary"].map(order)
    keys = ["place", "scorer", "explainer", "judge", "metric", "decile"]
    return table.sort_values(keys, kind="stable").drop(columns="place").reset_index(drop=True)


def decile_notes() -> list[str]:
    """The notes below the table."""
    return [
        "decile: of a feature's active windows by peak, 0 weakest, 9 strongest; its positives with all negatives.",
        "SE: two-way clustered by feature and window; it does not contain the spread between training seeds.",
    ]
