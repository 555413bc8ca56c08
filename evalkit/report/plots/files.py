"""Writes the figures of a run: ``scores`` (the comparison of dictionaries) and ``features`` (per-feature distributions).

Needs only the run's records. Writes PNG and SVG files, atomically; the same records give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from evalkit.errors import InputError
from evalkit.report.plots import style
from evalkit.report.plots.features_figure import features_figure
from evalkit.report.plots.scores_figure import scores_figure
from evalkit.report.rows import score_rows
from evalkit.store.frames import RunFrames

__all__ = ["plot_run"]


def plot_run(frames: RunFrames, folder: Path, metric: str = "auroc") -> list[Path]:
    """Write scores.png, scores.svg, features.png and features.svg into ``folder``; returns their paths.

    Scorers without this metric are drawn with their own metric. Raises InputError if the run has no score of this metric,
    BadConfig if the metric is unknown, and StorageError if the folder cannot be written.
    """
    rows = [row for row in score_rows(frames, (metric,)) if not row.source.matched]
    if not any(len(row.real.values) for row in rows):
        raise InputError(
            f"metric {metric}",
            expected="at least one feature with a score",
            seen="none in this run",
            fix="plot another metric (auroc and auprc need a judge that gives a confidence)",
        )
    with style.house_style():
        paths = style.save(scores_figure(rows), folder, "scores")
        return paths + style.save(features_figure(rows), folder, "features")
