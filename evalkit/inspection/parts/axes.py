"""Drawing helpers shared by the figures of all kinds of dictionaries. Knows matplotlib, but no parts and no files."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from evalkit.report.plots import style

__all__ = ["DASHES", "DOTS", "head", "panels", "percent", "say"]

DOTS = (0, (1, 2))
DASHES = (0, (4, 2))


def panels(figure: Figure, count: int, *, share: bool = False) -> list[Axes]:
    """Adds ``count`` panels side by side, in the house style."""
    found: list[Axes] = list(figure.subplots(1, max(count, 1), squeeze=False, sharey=share)[0])
    for axes in found:
        style.tidy(axes)
        axes.grid(axis="y", color=style.FAINT, linewidth=0.6)
    return found


def head(axes: Axes, letter: str, title: str) -> None:
    """Writes a letter and a title above a panel."""
    for text, indent, weight in ((letter, 0, "bold"), (title, 12, "normal")):
        axes.annotate(
            text, xy=(0, 1), xycoords="axes fraction", xytext=(indent, 6), textcoords="offset points", fontsize=9,
            fontweight=weight,
        )  # fmt: skip


def percent(axes: Axes) -> None:
    """Shows the shares on the value axis as percentages."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def say(axes: Axes, x: float, y: float, text: str, *, above: bool, indent: float = 0, align: str = "left") -> None:
    """Writes a small grey remark next to a point."""
    axes.annotate(
        text, (x, y), xytext=(indent, 3 if above else -3), textcoords="offset points", ha=align,
        va="bottom" if above else "top", fontsize=7.5, color="#555555",
    )  # fmt: skip
