"""Writes the training history of an RQAE as JSON and as a figure, into the folder of the weights.

Takes the numbers from a ``TrainingReport``; measures nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evalkit.report.plots import style
from evalkit.util.atomic_files import write_bytes
from rqae.training.loop import TrainingReport

__all__ = ["training_figure", "write_curves"]

_WINDOW = 25  # steps of the moving average


def write_curves(folder: Path, report: TrainingReport, name: str) -> list[Path]:
    """Write ``training.json``, ``training.png`` and ``training.svg``; returns their paths. Raises StorageError."""
    history = {
        "units": "FVU of final-normed hidden states: batches while training, held-out rows",
        "batches": [[step, round(fvu, 6)] for step, fvu in report.losses],
        "held_out": [[step, round(fvu, 6)] for step, fvu in report.curve],
        "held_out_by_depth_at_start": {str(depth): round(fvu, 6) for depth, fvu in report.fvu_start.items()},
        "held_out_by_depth": {str(depth): round(fvu, 6) for depth, fvu in report.fvu_held_out.items()},
    }
    path = folder / "training.json"
    write_bytes(path, (json.dumps(history) + "\n").encode())
    with style.house_style():
        return [path, *style.save(training_figure(report, name), folder, "training")]


def training_figure(report: TrainingReport, name: str) -> Figure:
    """Left: FVU of batches and of held-out rows by step. Right: held-out FVU by depth, at the start and at the end."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for axes in (left, right):
        style.tidy(axes)
        axes.set_yscale("log")
        axes.grid(axis="y", which="both", color=style.FAINT, linewidth=0.5)
    if report.losses:
        steps, values = (np.array(column) for column in zip(*report.losses, strict=True))
        left.plot(steps, values, color=style.SKY, linewidth=0.5, alpha=0.6, label="each batch")
        width = min(_WINDOW, len(values))
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        left.plot(steps[width - 1 :], mean, color=style.BLUE, linewidth=1.2, label=f"mean of {width} batches")
    if report.curve:
        steps, values = (np.array(column) for column in zip(*report.curve, strict=True))
        left.plot(steps, values, color=style.VERMILION, marker="o", markersize=3, linewidth=1, label="held-out rows")
    left.set_xlabel("step")
    left.set_ylabel("FVU, final-normed hidden states")
    left.set_title(f"training of {name}", loc="left")
    left.legend(frameon=False)
    for found, label, colour in (
        (report.fvu_start, "at the start", style.GREY),
        (report.fvu_held_out, "at the end", style.VERMILION),
    ):
        if found:
            right.plot(
                list(found), list(found.values()), color=colour, marker="o", markersize=3, linewidth=1, label=label
            )
    right.set_xscale("log", base=2)
    depths = list(report.fvu_held_out)
    right.set_xticks(depths, [str(depth) for depth in depths])
    right.set_xlabel("quantizers used")
    right.set_title("held-out rows, by depth", loc="left")
    right.legend(frameon=False)
    return figure
