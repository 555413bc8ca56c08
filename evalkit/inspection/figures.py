"""The figures of an inspection, one per part: PNG and SVG files in a folder.

Needs only the saved parts, no model; the same parts give the same bytes. The ``panels`` modules draw the contents; this
module creates and saves the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from evalkit.inspection.parts.cache import Part
from evalkit.inspection.rqae.panels import DRAW
from evalkit.inspection.sae.panels import DRAW as DRAW_SAE
from evalkit.report.plots import style

__all__ = ["draw_parts", "part_figure"]

_SIZE = (7.6, 3.5)


def draw_parts(about: Mapping[str, Any], parts: Sequence[Part], folder: Path) -> list[Path]:
    """Write ``PART.png`` and ``PART.svg`` for each part; returns their paths. Raises StorageError."""
    paths = []
    with style.house_style():
        for part in parts:
            paths += style.save(part_figure(about, part), folder, part.name)
    return paths


def part_figure(about: Mapping[str, Any], part: Part) -> Figure:
    """The figure of one part: its panels side by side, a caption below."""
    engine = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04)
    figure = Figure(figsize=_SIZE, layout=engine)
    draw = DRAW if about["kind"] == "rqae" else DRAW_SAE
    caption = draw[part.name](figure, part)
    style.caption(figure, f"{about['name']}. {caption}")
    return figure
