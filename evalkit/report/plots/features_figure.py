"""The figure of per-feature scores: the distribution behind the mean of each dictionary, one panel per setup.

A setup is a scorer with its explainer and judge. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import gaussian_kde

from evalkit.report.plots import style
from evalkit.report.plots.scores_figure import setup_title
from evalkit.report.rows import Row
from evalkit.stats.metrics import Scores
from evalkit.stats.standard_errors import macro_mean

__all__ = ["features_figure"]

_BELOW_0 = ("pearson",)  # metrics that can be negative; they do not share an axis with the others
_MOST_DOTS = 400  # with more features the dots overlap, so only the outline is drawn


def features_figure(rows: Sequence[Row]) -> Figure:
    """The figure of ``rows``, which hold one metric per scorer, explainer and judge.

    Dictionaries are listed from top to bottom in the order of the table.
    """
    sources = list({row.source.name: row.source for row in rows}.values())
    setups = list(dict.fromkeys(row.setup for row in rows))
    metrics = {row.setup: row.metric for row in rows}
    shared = len({metric in _BELOW_0 for metric in metrics.values()}) == 1
    columns = min(len(setups), 2)
    lines = -(-len(setups) // columns)
    height = 0.42 * len(sources) + 0.75
    figure = Figure(figsize=(1.6 + 3.6 * columns, 0.85 + height * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=shared, sharey=True, squeeze=False)
    labels, colours = style.names_of(sources), style.palette(sources)
    place = {source.name: -float(number) for number, source in enumerate(sources)}
    for axes, setup in zip(grid.flat, setups, strict=False):
        _prepare(axes, [labels[source.name] for source in sources], setup_title(setup, setups), metrics[setup])
        for row in rows:
            if row.setup == setup:
                _draw_row(axes, place[row.source.name], row, colours[row.source.kind])
    for axes in grid.flat[len(setups) :]:
        axes.set_visible(False)
    for number, (axes, setup) in enumerate(zip(grid.flat, setups, strict=False)):
        lowest = number >= len(setups) - columns  # the lowest panel of its column
        axes.tick_params(labelbottom=lowest or not shared)
        if lowest or len(set(metrics.values())) > 1:
            axes.set_xlabel(f"{style.METRIC_TITLES[metrics[setup]]} of a feature")
        mine = [row for row in rows if shared or row.setup == setup]
        ends = np.concatenate([scores.values for row in mine for scores in (row.real, row.shuffled)])
        axes.set_xlim(np.floor(10 * ends.min(initial=1.0)) / 10 - 0.01, 1.01)
    style.caption(figure, _caption(rows))
    return figure


def _prepare(axes: Axes, labels: Sequence[str], title: str, metric: str) -> None:
    style.tidy(axes)
    axes.set_title(title, loc="left")
    axes.set_ylim(-len(labels) + 0.42, 0.62)
    axes.set_yticks([-float(number) for number in range(len(labels))], labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=style.FAINT, linewidth=0.6)
    if (chance := style.CHANCE.get(metric)) is not None:
        axes.axvline(chance, color=style.GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)


def _draw_row(axes: Axes, y: float, row: Row, shade: str) -> None:
    real, shuffled = macro_mean(row.real), macro_mean(row.shuffled)
    _outline(axes, y, row.shuffled, style.GREY, filled=False)
    _outline(axes, y, row.real, shade, filled=True)
    if 0 < real.n <= _MOST_DOTS:
        dots = np.sort(row.real.values)
        depth = y - 0.1 - 0.22 * _spread_out(real.n)
        axes.scatter(dots, depth, s=5, color=shade, alpha=0.55, linewidths=0)
    if shuffled.n:
        axes.plot([shuffled.mean], [y], marker="o", color=style.GREY, markerfacecolor="white", markersize=4.5, zorder=4)
    if real.n:
        axes.errorbar(
            [real.mean], [y], xerr=[real.se], fmt="o", color=style.INK, markersize=4, elinewidth=1.4, zorder=5
        )
    else:
        axes.text(0.5, y, "no feature scored", ha="center", va="center", fontsize=7.5, color=style.GREY)


def _outline(axes: Axes, y: float, scores: Scores, shade: str, *, filled: bool) -> None:
    """Half a violin on the line y: the kernel density of the scores, at most 0.45 high, within the score's bounds."""
    values = scores.values
    if len(values) < 3 or np.ptp(values) == 0:
        return
    least, most = scores.bounds or (-np.inf, np.inf)
    x = np.linspace(max(least, values.min() - 0.05), min(most, values.max() + 0.05), 200)
    density = gaussian_kde(values)(x)
    height = y + 0.45 * density / density.max()
    if filled:
        axes.fill_between(x, y, height, color=shade, alpha=0.28, linewidth=0, zorder=2)
    axes.plot(x, height, color=shade, linewidth=1.0 if filled else 0.8, linestyle="-" if filled else "--", zorder=2.5)


def _spread_out(n: int) -> NDArray[np.float64]:
    """n numbers that fill [0, 1) evenly, consecutive ones far apart: van der Corput's sequence in base 2."""
    index, scale = np.arange(1, n + 1), 0.5
    result = np.zeros(n)
    while index.any():
        result += scale * (index % 2)
        index, scale = index // 2, scale / 2
    return result


def _caption(rows: Sequence[Row]) -> str:
    counts = sorted({len(row.real.values) for row in rows})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    explainers, judges = (", ".join(sorted({row.setup[place] for row in rows})) for place in (1, 2))
    return (
        f"Each dot is a feature (n = {n} per dictionary); the filled shape is the density of their scores. Dashed line: "
        "density with another feature's explanation (hollow: its mean). Black: mean; error bars: one SE, clustered by "
        f"feature and window. Explainer: {explainers}; judge: {judges}."
    )
