"""The score figure: score against L0 at one width, and against width at one L0, with RQAE depths and controls.

There is one row of panels per scorer, explainer and judge; the panels of a row share one score axis. An RQAE has no L0 and
no width, so its depths get a separate panel, as do the controls. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from evalkit.records import CONTROL_KIND
from evalkit.report.plots import style
from evalkit.report.plots.score_panels import Panels, arrange
from evalkit.report.rows import Row, Setup, Source, is_baseline
from evalkit.stats.standard_errors import Estimate, macro_mean

__all__ = ["scores_figure", "setup_title"]

_STRIPS = {"L0": 3.0, "width": 3.0, "others": 1.7, "rqae": 1.5, "controls": 1.7}  # relative widths


_Points: TypeAlias = Mapping[str, "_Point"]  # by name of the source


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    source: Source
    real: Estimate
    shuffled: Estimate
    shade: str
    baseline: Estimate | None


def scores_figure(rows: Sequence[Row]) -> Figure:
    """The figure of ``rows``, which hold one metric per scorer, explainer and judge."""
    sources = list({row.source.name: row.source for row in rows}.values())
    panels, colours = arrange(sources), style.palette(sources)
    every = {row.setup for row in rows}
    baselines = {(row.source.name, row.scorer): macro_mean(row.real) for row in rows if is_baseline(row.setup, every)}
    rows = [row for row in rows if not is_baseline(row.setup, every)]
    setups = list(dict.fromkeys(row.setup for row in rows))
    metrics = {row.setup: row.metric for row in rows}
    points: dict[Setup, _Points] = {
        setup: {
            row.source.name: _Point(
                row.source,
                macro_mean(row.real),
                macro_mean(row.shuffled),
                colours[row.source.kind],
                baselines.get((row.source.name, row.scorer)),
            )
            for row in rows
            if row.setup == setup
        }
        for setup in setups
    }
    strips = [name for name in _STRIPS if _members(panels, name)]
    widths = [_STRIPS[name] for name in strips]
    engine = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.06, wspace=0.02, hspace=0.03)
    figure = Figure(figsize=(max(4.2, 0.9 + 0.86 * sum(widths)), 1.15 + 2.25 * len(setups)), layout=engine)
    grid = figure.subplots(len(setups), len(strips), sharey="row", squeeze=False, width_ratios=widths)
    for line, setup in zip(grid, setups, strict=True):
        name = setup_title(setup, setups).replace(" · ", "\n")  # one line each, to fit the height of the axis
        line[0].set_ylabel(f"{name}\n{style.METRIC_TITLES[metrics[setup]]}")
        _draw_row(line, strips, panels, points[setup], metrics[setup], is_last=setup == setups[-1])
    for letter, axes, name in zip("abcde", grid[0], strips, strict=False):
        _head(axes, letter, _title(panels, name))
    _legend(figure, panels, colours, set(metrics.values()), baselines=bool(baselines))
    style.caption(figure, _caption(rows, panels))
    return figure


def _head(axes: Axes, letter: str, title: str) -> None:
    for text, indent, weight in ((letter, 0, "bold"), (title, 12, "normal")):
        axes.annotate(
            text,
            xy=(0, 1),
            xycoords="axes fraction",
            xytext=(indent, 6),
            textcoords="offset points",
            fontsize=9,
            fontweight=weight,
        )


def setup_title(setup: Setup, setups: Sequence[Setup]) -> str:
    """The scorer, with the explainer or judge if the scorer has several."""
    mine = [other for other in setups if other[0] == setup[0]]
    several = [part for place, part in ((1, setup[1]), (2, setup[2])) if len({other[place] for other in mine}) > 1]
    return " · ".join([setup[0], *several])


def _members(panels: Panels, strip: str) -> tuple[Source, ...]:
    found = {"L0": panels.by_l0, "width": panels.by_width, "others": panels.others}
    return {**found, "rqae": panels.rqae, "controls": panels.controls}[strip]


def _title(panels: Panels, strip: str) -> str:
    if strip == "L0":
        return f"{_who(panels.by_l0)}width {style.short_number(panels.width or 0)}"
    return {
        "width": f"{_who(panels.by_width)}L0 ≈ {style.short_number(panels.l0 or 0)}",
        "others": "L0 unknown",
        "rqae": "RQAE",
        "controls": "controls",
    }[strip]


def _who(sources: Sequence[Source]) -> str:
    return "SAEs, " if {source.kind for source in sources} == {"sae"} else ""


def _draw_row(
    line: Sequence[Axes], strips: Sequence[str], panels: Panels, points: _Points, metric: str, is_last: bool
) -> None:
    low, high = _limits([point for name, point in points.items() if name not in _names(panels.controls)], metric)
    line[0].set_ylim(low, high)
    for axes, strip in zip(line, strips, strict=True):
        style.tidy(axes)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color=style.FAINT, linewidth=0.6)
        if (chance := style.CHANCE.get(metric)) is not None and low < chance < high:
            axes.axhline(chance, color=style.GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        members = [points[source.name] for source in _members(panels, strip) if source.name in points]
        _DRAW[strip](axes, members, panels, is_last)
        if axes is not line[0]:
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)


def _names(sources: Sequence[Source]) -> set[str]:
    return {source.name for source in sources}


def _limits(points: Sequence[_Point], metric: str) -> tuple[float, float]:
    """Limits of the score axis that show every dictionary and its null with one SE and a margin.

    ``points`` leaves out the controls; a control outside the limits is drawn as an arrow.
    """
    drawn = [one for point in points for one in (point.real, point.shuffled, point.baseline) if one is not None]
    estimates = [estimate for estimate in drawn if estimate.n]
    ends = [e.mean + sign * (e.se if e.se == e.se else 0.0) for e in estimates for sign in (-1, 1)]
    ends += [style.CHANCE[metric]] if metric in style.CHANCE else []
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    margin = max(0.02, 0.08 * (high - low))
    return low - margin, high + margin


def _draw_numeric(
    axes: Axes, members: Sequence[_Point], x_of: Callable[[Source], float], is_last: bool, label: str
) -> None:
    series: dict[tuple[str, str], list[_Point]] = {}
    for point in sorted(members, key=lambda point: x_of(point.source)):
        series.setdefault((point.source.kind, point.source.site), []).append(point)
    for line in series.values():
        x = [x_of(point.source) for point in line]
        axes.plot(x, [point.real.mean for point in line], color=line[0].shade, linewidth=1.2, zorder=2)
        axes.plot(x, [point.shuffled.mean for point in line], color=style.GREY, linewidth=0.7, zorder=1.5)
        for place, point in zip(x, line, strict=True):
            _mark(axes, place, point)
    values = sorted({x_of(point.source) for point in members})
    axes.set_xscale("log", base=2)
    if values:
        spread = max(values[-1] / values[0], 1.5)
        axes.set_xlim(values[0] / spread**0.12, values[-1] * spread**0.12)
        ticks = _apart(values, spread)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FixedFormatter([style.short_number(value) for value in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    if is_last:
        axes.set_xlabel(label)
    else:
        axes.tick_params(labelbottom=False)


def _apart(values: Sequence[float], spread: float) -> list[float]:
    """The values that get a tick label: at least about an eighth of the axis apart, so that labels do not touch."""
    kept: list[float] = []
    for value in values:
        if not kept or value / kept[-1] >= spread**0.12:
            kept.append(value)
    return kept


def _draw_by_l0(axes: Axes, members: Sequence[_Point], panels: Panels, is_last: bool) -> None:
    _draw_numeric(axes, members, lambda source: source.l0 or 0.0, is_last, "L0 (active features per token)")


def _draw_by_width(axes: Axes, members: Sequence[_Point], panels: Panels, is_last: bool) -> None:
    _draw_numeric(axes, members, lambda source: float(source.width or 0), is_last, "width (features)")


def _draw_strip(axes: Axes, members: Sequence[_Point], names: Sequence[str], key: Callable[[Source], str]) -> None:
    """Draws points in named columns; points of the same column are side by side."""
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xticks(range(len(names)), names)
    for column, name in enumerate(names):
        here = [point for point in members if key(point.source) == name]
        for place, point in enumerate(here):
            offset = 0.0 if len(here) == 1 else 0.6 * (place / (len(here) - 1) - 0.5)
            _mark(axes, column + offset, point, dodge=0.14 / len(here) if point.source.is_null else 0.0)


def _draw_rqae(axes: Axes, members: Sequence[_Point], panels: Panels, is_last: bool) -> None:
    depths = [str(source.depth or "all") for source in sorted(panels.rqae, key=lambda source: source.depth or 1 << 30)]
    _draw_strip(axes, members, list(dict.fromkeys(depths)), lambda source: str(source.depth or "all"))
    axes.set_facecolor("#FBF6F2")
    if is_last:
        axes.set_xlabel("depth (quantizers)")
    else:
        axes.tick_params(labelbottom=False)


def _draw_others(axes: Axes, members: Sequence[_Point], panels: Panels, is_last: bool) -> None:
    names = {source.name: source.name.rsplit("/", 1)[-1] for source in panels.others}
    _draw_strip(axes, members, list(dict.fromkeys(names.values())), lambda source: names[source.name])
    _tilt(axes, is_last)


def _tilt(axes: Axes, is_last: bool) -> None:
    for label in axes.get_xticklabels():
        label.set(fontsize=7, rotation=45, ha="right", rotation_mode="anchor", linespacing=0.9)
    if not is_last:
        axes.tick_params(labelbottom=False)


def _draw_controls(axes: Axes, members: Sequence[_Point], panels: Panels, is_last: bool) -> None:
    def name(source: Source) -> str:
        return source.kind.removeprefix(CONTROL_KIND).replace("-", "\n")

    _draw_strip(axes, members, list(dict.fromkeys(name(source) for source in panels.controls)), name)
    axes.set_facecolor("#F6F6F6")
    _tilt(axes, is_last)


_DRAW: dict[str, Callable[[Axes, Sequence[_Point], Panels, bool], None]] = {
    "L0": _draw_by_l0,
    "width": _draw_by_width,
    "others": _draw_others,
    "rqae": _draw_rqae,
    "controls": _draw_controls,
}


def _mark(axes: Axes, x: float, point: _Point, dodge: float = 0.0) -> None:
    """Draws a score (filled) and its shuffled null (hollow), each with one SE; off the axis, an arrow with the value.

    ``dodge``: distance by which the score moves to the left and the null to the right, for points expected to coincide.
    """
    low, high = axes.get_ylim()
    marker, shade = _marker(point.source), point.shade
    if point.baseline is not None and point.baseline.n and low <= point.baseline.mean <= high:
        axes.plot(
            [x], [point.baseline.mean], marker="x", color=style.INK, markersize=4.5, markeredgewidth=0.8, zorder=2.5
        )
    for estimate, place, filled in ((point.shuffled, x + dodge, False), (point.real, x - dodge, True)):
        if not estimate.n:
            continue
        if not low <= estimate.mean <= high:
            _mark_outside(axes, place, estimate.mean, shade, above=estimate.mean > high)
            continue
        axes.errorbar(
            [place],
            [estimate.mean],
            yerr=[estimate.se],
            fmt=marker,
            color=shade if filled else style.GREY,
            markerfacecolor=shade if filled else "white",
            markersize=5.5 if filled else 4.5,
            markeredgewidth=0.9,
            elinewidth=1.1 if filled else 0.8,
            capsize=0,
            zorder=4 if filled else 3,
        )


def _mark_outside(axes: Axes, x: float, mean: float, shade: str, *, above: bool) -> None:
    low, high = axes.get_ylim()
    edge = high if above else low
    inward = -1 if above else 1
    axes.annotate(
        f"{mean:.2f}",
        xy=(x, edge),
        xytext=(0, inward * 17),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=7.5,
        color=shade,
        arrowprops={"arrowstyle": "-|>", "color": shade, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.0},
        zorder=4,
    )


def _marker(source: Source) -> str:
    return "s" if source.is_null else "D" if source.is_rqae else "o"


def _legend(
    figure: Figure, panels: Panels, colours: Mapping[str, str], metrics: Collection[str], *, baselines: bool
) -> None:
    kinds = {source.kind: source for source in (*panels.by_l0, *panels.by_width, *panels.others, *panels.rqae)}
    handles = [
        _sample(style.kind_label(kind), color=colours[kind], marker=_marker(source), markersize=5.5)
        for kind, source in kinds.items()
    ]
    dots = {"color": style.GREY, "linestyle": ""}
    if panels.controls:
        handles.append(_sample("control", **dots, marker="s", markersize=5.5))
    handles.append(_sample("shuffled explanations", **dots, marker="o", markerfacecolor="white", markersize=4.5))
    if baselines:
        handles.append(_sample("lexical baseline", color=style.INK, linestyle="", marker="x", markersize=4.5))
    if any(metric in style.CHANCE for metric in metrics):
        handles.append(_sample("chance", color=style.GREY, linewidth=0.8, linestyle=(0, (1, 2))))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, handlelength=1.6)


def _sample(label: str, **look: Any) -> Line2D:
    return Line2D([], [], label=label, **look)


def _caption(rows: Sequence[Row], panels: Panels) -> str:
    titles = ", ".join(dict.fromkeys(style.METRIC_TITLES[row.metric] for row in rows))
    counts = sorted({len(row.real.values) for row in rows})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    explainers, judges = (", ".join(sorted({row.setup[place] for row in rows})) for place in (1, 2))
    text = (
        f"{titles}, mean over n = {n} features per dictionary. Explainer: {explainers}; "
        f"judge: {judges}. Error bars: one SE, clustered by feature and window, without the spread between training "
        "seeds. Hollow: the same judge given the explanation of another feature."
    )
    if panels.left_out:
        total = len({row.source.name for row in rows})
        text += f" Only in the table, because they fit no panel: {len(panels.left_out)} of {total} dictionaries."
    return text
