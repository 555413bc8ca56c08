"""The figures of a run, as files: ``scores`` (the published comparison) and ``features`` (per-feature distributions).

Works from the records alone. Writes PNG and SVG, atomically; the same records give the same bytes.
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

    Scorers that do not have the metric are drawn in their own. Raises InputError when the run has no score of this
    metric, BadConfig for an unknown one, StorageError when the folder cannot be written.
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
