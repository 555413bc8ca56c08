"""The contents of the figures of dictionaries other than RQAEs: one function per part draws it and returns the caption.

Knows matplotlib and the columns of the parts. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from evalkit.inspection.parts.axes import DASHES, DOTS, head, panels, percent, say
from evalkit.inspection.parts.cache import Part
from evalkit.report.plots import style

__all__ = ["DRAW"]

_FILL: dict[str, Any] = {"fill": True, "alpha": 0.28, "zorder": 2}
_LINE: dict[str, Any] = {"linewidth": 1.1, "zorder": 3}
_WHITE: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}


def _fit(figure: Figure, part: Part) -> str:
    row, by_token = part.rows[0], part.further["by_token"]
    titles = {
        "l0": "latents that fire (L0)",
        "cosine": "cosine with the state",
        "norm_ratio": "norm / norm of the state",
    }
    means = {"l0": f"{row['l0']:.1f}", "cosine": f"{row['cosine']:.3f}", "norm_ratio": f"{row['norm_ratio']:.3f}"}
    for letter, axes, (name, title) in zip("abc", panels(figure, 3), titles.items(), strict=True):
        head(axes, letter, title)
        edges, shares = (np.array(by_token[name][key]) for key in ("edges", "shares"))
        axes.stairs(shares, edges, color=style.BLUE, **_FILL)
        axes.stairs(shares, edges, color=style.BLUE, **_LINE)
        axes.axvline(row[name], color=style.INK, linewidth=0.9, linestyle=DASHES, zorder=4)
        axes.set_ylim(0, 1.22 * max(shares))
        beyond = max(0, 10 - len(edges)) / 2 if name == "l0" else 0
        axes.set_xlim(edges[0] - beyond, edges[-1] + beyond)
        right = row[name] < (edges[0] + edges[-1]) / 2
        axes.annotate(
            f"mean {means[name]}", (row[name], 0.99), xycoords=("data", "axes fraction"), xytext=(4 if right else -4, 0),
            textcoords="offset points", ha="left" if right else "right", va="top", fontsize=8,
        )  # fmt: skip
        percent(axes)
        if max(shares) > 0.8:
            axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=name == "l0"))
    first, ratios = figure.axes[0], figure.axes[2]
    ratios.axvline(1, color=style.GREY, linewidth=0.8, linestyle=DOTS, zorder=1)
    declared = row["l0_declared"]
    edges = by_token["l0"]["edges"]
    if declared is not None and edges[0] < declared < edges[-1]:
        first.axvline(declared, color=style.VERMILION, linewidth=0.9, linestyle=DOTS, zorder=4)
    first.set_ylabel("share of tokens")
    dotted = f"; dotted: the declared L0, {declared:.4g}" if declared is not None else ""
    return (
        f"{row['tokens']:,} tokens, each compared with its reconstruction. FVU {_shown(row['fvu'])}; after the best "
        f"rescaling (× {_shown(row['rescale'])}), {_shown(row['fvu_rescaled'])}. {row['alive_share']:.1%} of the latents "
        f"fire on at least one of these tokens. Dashed: means{dotted}."
    )


def _density(figure: Figure, part: Part) -> str:
    axes = panels(figure, 1)[0]
    dead, bins = part.rows[0]["latents"], part.rows[1:]
    tokens, median = part.further["tokens"], part.further["median"]
    edges = np.array([row["low"] for row in bins] + [bins[-1]["high"]])
    counts = np.array([row["latents"] for row in bins])
    seen = -np.log10(tokens) if tokens else edges[int(counts.argmax())] - 1  # the rate of a latent that fires once
    first = max(edges[0], edges[np.searchsorted(edges, min(seen, -2), side="right") - 1])
    kept = edges[:-1] >= first
    shown = np.append(edges[:-1][kept], edges[-1])
    axes.stairs(counts[kept], shown, color=style.BLUE, **_FILL)
    axes.stairs(counts[kept], shown, color=style.BLUE, **_LINE)
    place = first - 0.55
    axes.bar([place], [dead], width=0.32, color=style.GREY, alpha=0.55, zorder=2)
    top = 1.14 * max(int(counts.max()), dead, 1)
    axes.annotate(
        f"{dead:,}", (place, dead), xytext=(0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8,
        color="#555555",
    )  # fmt: skip
    if median is not None:
        axes.axvline(np.log10(median), color=style.INK, linewidth=0.9, linestyle=DASHES, zorder=4)
        side = "right" if median > 0.2 else "left"
        indent = -4 if median > 0.2 else 4
        text = f"median {_percentage(median)}"
        say(axes, float(np.log10(median)), top, text, above=False, indent=indent, align=side)
    axes.set_ylim(0, top)
    axes.set_xlim(place - 0.35, 0.05)
    decades = [decade for decade in range(-6, 1) if decade >= first - 1e-9]
    axes.xaxis.set_major_locator(FixedLocator([place, *decades]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "never" if value < first - 0.1 else _power(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    features_are = part.further["features_are"]
    axes.set_xlabel("share of tokens on which it fires")
    axes.set_ylabel(features_are)
    seen_on = f" on {tokens:,} tokens" if tokens else ", with rates declared by the export"
    rarest = f"; the lowest rate that can be measured is {_percentage(1 / tokens)}" if tokens else ""
    return (
        f"{part.further['latents']:,} {features_are}{seen_on}, in bins of a quarter of a decade{rarest}. "
        "Dashed: the median of those that fire. Grey: those that never fire."
    )


def _geometry(figure: Figure, part: Part) -> str:
    left, right = panels(figure, 2)
    head(left, "a", "nearest neighbour, cosine")
    head(right, "b", "how often a row is a nearest neighbour")
    density, random = np.array(part.further["density"]), part.further["random"]
    edges = np.linspace(-1, 1, len(density) + 1)
    left.stairs(density, edges, color=style.BLUE, **_FILL)
    left.stairs(density, edges, color=style.BLUE, **_LINE, label=part.further["rows_are"])
    filled = np.flatnonzero(density)
    low = edges[filled[0]] if len(filled) else 0
    high = edges[filled[-1] + 1] if len(filled) else 1
    tallest = density.max()
    if random is not None:
        curve, fine = np.array(random), np.linspace(-1, 1, len(random) + 1)
        likely = np.flatnonzero(curve > 1e-3 * curve.max())
        low, high = min(low, fine[likely[0]]), max(high, fine[likely[-1] + 1])
        left.plot(
            (fine[:-1] + fine[1:]) / 2,
            curve,
            color=style.INK,
            linewidth=0.9,
            linestyle=DASHES,
            zorder=4,
            label="random directions",
        )
        tallest = max(tallest, min(curve.max(), 8 * tallest))
    margin = 0.03 * (high - low)
    left.set_xlim(max(-1, low - margin), min(1, high + margin))
    left.set_ylim(0, 1.12 * tallest or 1)
    left.set_ylabel("density")
    left.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    left.legend(loc="best", frameon=False)
    _degrees(right, part)
    largest = part.rows[0]["value"] if part.rows[0]["statistic"].startswith("largest") else None
    sampled = f" (a random sample of {part.further['rows']:,})" if part.further["sampled"] else ""
    closest = f" The closest pair has cosine {largest:.3f}." if largest is not None else ""
    features_are = part.further["features_are"]
    drawn = " Dashed: random directions." if part.further["random"] is not None else ""
    return (
        f"{part.further['of']:,} {part.further['rows_are']} in {part.further['dim']} dimensions{sampled}, each with its "
        f"nearest neighbour.{closest} Right: number of {features_are} that are the nearest neighbour of so many others."
        f"{drawn}"
    )


def _degrees(axes: Axes, part: Part) -> None:
    counts = np.array(part.further["in_degrees"])
    places = np.flatnonzero(counts)
    last = int(places[-1]) if len(places) else 0
    if last <= 60:
        for shade, alpha in (("white", 1.0), (style.BLUE, 0.45)):  # white hides the grid behind the transparent bars
            axes.bar(places, counts[places], width=0.8, color=shade, alpha=alpha, zorder=2)
    else:
        axes.plot(places, counts[places], color=style.BLUE, linewidth=0, marker="o", markersize=3, alpha=0.7, zorder=3)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(-0.3, 2 * last)
    random = part.further["random_in_degrees"]
    if random is not None:
        drawn = np.flatnonzero(random)
        axes.plot(drawn, np.array(random)[drawn], color=style.INK, linewidth=0.9, linestyle=DASHES, zorder=4)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 3 * max(counts.max(initial=1), 1))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if last <= 60:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("number of others whose nearest neighbour it is")
    axes.set_ylabel(part.further["features_are"])
    row = part.rows[-1]
    if row["latents"] and last:
        text = f"most: {part.further['features_are'][:-1]} {row['latents'][0]}, {row['value']:,} times"
        axes.text(0.98, 0.96, text, transform=axes.transAxes, ha="right", va="top", fontsize=8, bbox=_WHITE)


def _loss(figure: Figure, part: Part) -> str:
    axes = panels(figure, 1)[0]
    rows = {row["states"]: row for row in part.rows}
    clean = rows["the model's own"]["loss"]
    words = {"reconstruction": "reconstruction", "mean": "the mean state", "zero": "zeros"}
    for place, (name, word) in enumerate(reversed(words.items())):
        row = rows[name]
        colour = style.BLUE if name == "reconstruction" else style.GREY
        for shade, alpha in (("white", 1.0), (colour, 0.45)):  # white hides the grid behind the transparent bars
            axes.barh(place, row["loss_change"], left=clean, height=0.5, color=shade, alpha=alpha, zorder=2)
        axes.errorbar(
            [row["loss"]], [place], xerr=[row["se"] or 0], color=style.INK, elinewidth=1.1, fmt="none", zorder=3
        )
        text = f"{row['loss']:.3f}" + (f", {row['recovered_zero']:.1%} recovered" if name == "reconstruction" else "")
        if row["recovered_zero"] is None:
            text = f"{row['loss']:.3f}"
        axes.annotate(
            text, (max(row["loss"], clean) + (row["se"] or 0), place), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
        axes.annotate(
            word, (0, place), xycoords=("axes fraction", "data"), xytext=(-8, 0), textcoords="offset points", ha="right",
            va="center", fontsize=8.5,
        )  # fmt: skip
    axes.axvline(clean, color=style.INK, linewidth=0.9, linestyle=DASHES, zorder=4)
    losses = [row["loss"] for row in part.rows]
    span = max(max(losses) - clean, 1e-3)
    axes.set_xlim(min([clean, *losses]) - 0.04 * span, max(losses) + 0.16 * span)
    axes.set_ylim(-0.55, 2.75)
    say(axes, clean, 2.73, f"the model's own states: {clean:.3f}", above=False, indent=5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=style.FAINT, linewidth=0.6)
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("next-token loss, nats")
    return (
        "Loss with the hidden states replaced, except those of BOS and attention sinks; "
        f"{part.further['predictions']:,} predictions. Error bars: one SE of the change, clustered by document. "
        "Recovered: 1 - change / change with zeros."
    )


def _power(value: float) -> str:
    return "1" if abs(value) < 1e-9 else f"$10^{{{value:.0f}}}$"


def _percentage(share: float) -> str:
    return f"{share:.1%}" if share >= 0.01 else f"1 in {1 / share:,.0f} tokens"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


DRAW: dict[str, Callable[[Figure, Part], str]] = {
    "fit": _fit,
    "density": _density,
    "geometry": _geometry,
    "loss": _loss,
}
