"""The contents of the figures of an RQAE: one function per part draws its panels and returns the caption.

Knows matplotlib and the columns of the parts. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from evalkit.inspection.parts.axes import DASHES, DOTS, head, panels, percent, say
from evalkit.inspection.parts.cache import Part
from evalkit.report.plots import style

__all__ = ["DRAW"]

_MARK: dict[str, Any] = {"linewidth": 1.4, "marker": "D", "markersize": 5, "zorder": 4}


def _prefixes(figure: Figure, part: Part) -> str:
    rows = part.rows
    total = rows[0]["tokens"]
    depths = [row["depth"] for row in rows]
    left, right = _pair(figure, "distinct prefixes", "tokens with a unique prefix")
    left.plot(depths, [row["prefixes"] for row in rows], color=style.VERMILION, **_MARK)
    left.axhline(total, color=style.GREY, linewidth=0.8, linestyle=DOTS)
    say(left, depths[0], total, f"{total:,} tokens", above=True)
    left.set_yscale("log")
    left.set_ylim(rows[0]["prefixes"] / 3, total * 4)
    for row in rows[:4]:
        if row["tokens_per_prefix"] > 1.1:
            text = f"{row['tokens_per_prefix']:,.1f} tokens each"
            say(left, row["depth"], row["prefixes"], text, above=False, indent=8)
    right.plot(depths, [row["alone"] for row in rows], color=style.VERMILION, clip_on=False, **_MARK)
    right.fill_between(depths, [row["alone"] for row in rows], color=style.VERMILION, alpha=0.12, linewidth=0)
    right.set_ylim(0, 1.03)
    percent(right)
    for axes in (left, right):
        _depth_axis(axes, depths)
    return "A prefix of depth k is a token's codes in the first k quantizers."


def _cosines(figure: Figure, part: Part) -> str:
    histograms, random, spaces = (part.further[name] for name in ("histograms", "random", "spaces"))
    kinds = [kind for kind in ("across quantizers", "within a quantizer") if kind in histograms]
    small = {row["kind"]: row["small"] for row in part.rows}
    for letter, axes, kind in zip("ab", panels(figure, len(kinds)), kinds, strict=False):
        density = histograms[kind] if kind.startswith("across") else _coarser(histograms[kind], 4)
        edges = np.linspace(-1, 1, len(density) + 1)
        head(axes, letter, f"pairs {kind}")
        axes.axvspan(-0.2, 0.2, color="#F6F6F6", zorder=0)
        axes.stairs(density, edges, color=style.VERMILION, fill=True, alpha=0.28, zorder=2)
        axes.stairs(density, edges, color=style.VERMILION, linewidth=1.1, zorder=3)
        if kind in random:
            middles = (np.arange(len(random[kind])) + 0.5) * 2 / len(random[kind]) - 1
            axes.plot(middles, random[kind], color=style.INK, linewidth=0.9, linestyle=DASHES, zorder=4)
        share = f"{small[kind]:.1%} below 0.2"
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(0.98, 0.96, share, transform=axes.transAxes, ha="right", va="top", fontsize=8, bbox=white)
        axes.set_xlabel("cosine")
        reach = _reach(density, edges)
        axes.set_xlim(-reach, reach)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set_ylim(bottom=0)
    return (
        "Density of the cosine between decoded codes. Dashed: random directions, on the left in the "
        f"{spaces['across quantizers']} dimensions of the hidden state, on the right in the "
        f"{spaces['within a quantizer']} dimensions of a code. Grey: cosines below 0.2 in absolute value."
    )


def _coarser(density: Sequence[float], factor: int) -> list[float]:
    """The histogram with ``factor`` bins merged into one, because codes of one quantizer have few distinct cosines."""
    means: list[float] = np.asarray(density).reshape(-1, factor).mean(axis=1).tolist()
    return means


def _reach(density: Sequence[float], edges: NDArray[np.float64]) -> float:
    """The limit of the axis on both sides of 0; it leaves out at most a thousandth of the pairs and is above 0.2."""
    outward = np.maximum(np.abs(edges[1:]), np.abs(edges[:-1]))
    order = np.argsort(outward)
    share = np.cumsum(np.asarray(density)[order]) / max(sum(density), 1e-12)
    reach = float(outward[order][min(int(np.searchsorted(share, 0.999)), len(order) - 1)])
    return 1.0 if reach > 0.8 else max(0.3, reach)


def _layers(figure: Figure, part: Part) -> str:
    numbers = np.array([row["quantizer"] for row in part.rows])
    left, right = _pair(figure, "weight of a quantizer", "cumulative share of the weight")
    left.plot(numbers, [row["weight"] for row in part.rows], color=style.VERMILION, linewidth=1.4)
    left.set_ylim(0, 1.06 * max(row["weight"] for row in part.rows))
    cumulative = np.array([row["cumulative"] for row in part.rows])
    right.plot(numbers, cumulative, color=style.VERMILION, linewidth=1.4)
    right.fill_between(numbers, cumulative, color=style.VERMILION, alpha=0.12, linewidth=0)
    for depth in (16, 64, 256):
        if depth < len(numbers):
            right.plot([depth], [cumulative[depth - 1]], color=style.VERMILION, marker="D", markersize=5)
            say(
                right,
                depth,
                cumulative[depth - 1],
                f"first {depth}: {cumulative[depth - 1]:.0%}",
                above=False,
                indent=8,
            )
    right.set_ylim(0, 1.03)
    percent(right)
    for axes in (left, right):
        axes.set_xlim(0, len(numbers) * 1.02)
        axes.set_xlabel("quantizer")
    return "The weight of a quantizer in an intensity is the mean length of its decoder columns."


def _fit(figure: Figure, part: Part) -> str:
    rows = part.rows
    depths = [row["depth"] for row in rows]
    left, right = _pair(figure, "unexplained variance (FVU)", "rise in next-token loss, nats")
    left.plot(depths, [row["fvu"] for row in rows], color=style.VERMILION, label="raw hidden state", **_MARK)
    left.plot(
        depths, [row["fvu_normed"] for row in rows], color=style.GREY, linewidth=0.9, marker="D", markersize=4,
        markerfacecolor="white", label="final-normed", zorder=3,
    )  # fmt: skip
    left.set_yscale("log")
    left.legend(loc="lower left", frameon=False)
    costs, errors = ([_number(row[name]) for row in rows] for name in ("loss_change", "se"))
    right.errorbar(depths, costs, yerr=errors, color=style.VERMILION, elinewidth=1.1, capsize=0, **_MARK)
    if min(costs) > 0:
        right.set_yscale("log")
    else:
        right.set_yscale("symlog", linthresh=1e-3)
    ablated = {name: part.further["ablated"][name]["mean"] for name in ("zero", "mean")}
    for name, text in (("zero", "replaced by zeros"), ("mean", "replaced by the mean state")):
        right.axhline(ablated[name], color=style.GREY, linewidth=0.8, linestyle=DOTS)
        above = ablated[name] == max(ablated.values())
        say(right, depths[-1], ablated[name], text, above=above, align="right")
    right.set_ylim(top=max(*ablated.values(), *costs) * 3)
    for axes in (left, right):
        _depth_axis(axes, depths)
    return (
        "Hidden states replaced by the reconstruction at each depth. Loss without replacement: "
        f"{part.further['loss']:.2f} over {part.further['predictions']:,} predictions. Error bars: one SE, clustered by "
        "document."
    )


def _ranks(figure: Figure, part: Part) -> str:
    axes = panels(figure, 1)[0]
    values = np.array(part.further["values"], dtype=np.float64)  # (depth, feature)
    axes.axhline(0, color=style.GREY, linewidth=0.8, linestyle=DOTS, zorder=1)
    for place, (row, line) in enumerate(zip(part.rows, values, strict=True)):
        known = line[~np.isnan(line)]
        spread = np.linspace(-0.28, 0.28, len(known))[_shuffled(len(known))] if len(known) else known
        axes.scatter(place + spread, known, s=9, color=style.VERMILION, alpha=0.45, linewidth=0, zorder=2)
        if row["mean"] is not None:
            axes.errorbar(
                [place],
                [row["mean"]],
                yerr=[_number(row["se"])],
                color=style.INK,
                fmt="o",
                markersize=5,
                elinewidth=1.4,
                zorder=4,
            )
        if len(known) < row["tried"]:
            axes.annotate(
                f"{len(known)} of {row['tried']}", (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", fontsize=7, color=style.GREY,
            )  # fmt: skip
    axes.set_xticks(range(len(values)), [str(row["depth"]) for row in part.rows])
    axes.set_xlabel("depth (quantizers)")
    axes.set_ylabel("Spearman's correlation")
    axes.set_xlim(-0.6, len(values) - 0.4)
    return (
        f"Each dot is a feature: the rank correlation, over its {part.further['top']} most intense tokens, of intensity "
        "with the cosine between a token's hidden state and that of the feature's own token. Black: mean and one SE over "
        "features. Features whose tokens all have the same intensity are left out."
    )


def _sae(figure: Figure, part: Part) -> str:
    values = np.array(part.further["values"], dtype=np.float64)  # (made from, example set, depth, latent)
    looks = (("encoder column", style.BLUE, "o"), ("top example", style.VERMILION, "D"))
    line, depths = panels(figure, 2, share=True), sorted({row["depth"] for row in part.rows})
    for place, (axes, name) in enumerate(zip(line, ("top", "median"), strict=True)):
        head(axes, "ab"[place], {"top": "strongest contexts", "median": "contexts of median strength"}[name])
        for way, (made_from, colour, marker) in enumerate(looks):
            rows = [row for row in part.rows if row["made_from"] == made_from and row["examples"] == name]
            low, high = np.array([_quartiles(line) for line in values[way, place]]).T
            axes.fill_between(depths, low, high, color=colour, alpha=0.12, linewidth=0)
            means, errors = ([_number(row[key]) for row in rows] for key in ("mean", "se"))
            axes.errorbar(
                depths, means, yerr=errors, color=colour, marker=marker, markersize=5, linewidth=1.4, elinewidth=1.1,
                label=f"made from its {made_from}", zorder=4,
            )  # fmt: skip
        axes.axhline(0, color=style.GREY, linewidth=0.8, linestyle=DOTS)
        _depth_axis(axes, depths)
    line[0].set_ylabel("Pearson's correlation")
    line[0].legend(loc="best", frameon=False)
    return (
        f"RQAE features made from {len(part.further['latents'])} latents of {part.further['dictionary']}: correlation of "
        "their intensity with the latent's activation, over the tokens of these contexts. Mean and one SE over latents; "
        "shaded: the middle half of the latents."
    )


DRAW: dict[str, Callable[[Figure, Part], str]] = {
    "prefixes": _prefixes,
    "cosines": _cosines,
    "layers": _layers,
    "fit": _fit,
    "ranks": _ranks,
    "sae": _sae,
}


def _pair(figure: Figure, left: str, right: str) -> list[Axes]:
    """Adds two panels with these titles."""
    found = panels(figure, 2)
    for letter, axes, title in zip("ab", found, (left, right), strict=True):
        head(axes, letter, title)
    return found


def _depth_axis(axes: Axes, depths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(depths)))
    axes.xaxis.set_major_formatter(FixedFormatter([str(depth) for depth in depths]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("depth (quantizers)")


def _quartiles(values: NDArray[np.float64]) -> tuple[float, float]:
    """The lower and upper quartile, ignoring NaN; NaN if there are no values."""
    known = values[~np.isnan(values)]
    return (float(np.quantile(known, 0.25)), float(np.quantile(known, 0.75))) if len(known) else (np.nan, np.nan)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _shuffled(count: int) -> NDArray[np.int64]:
    """A fixed random permutation, to spread neighbouring values apart."""
    return np.random.default_rng(0).permutation(count)
