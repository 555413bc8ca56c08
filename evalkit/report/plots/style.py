"""The style of all figures: colours, names of dictionaries, number formats of axes, and reproducible files.

Knows matplotlib and the terms of a table, but no statistics. Writes PNG and SVG files, each whole or not at all.
"""

from __future__ import annotations

import io
import os
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evalkit.errors import StorageError
from evalkit.records import CONTROL_KIND
from evalkit.report.rows import Source

__all__ = [
    "CHANCE",
    "GREY",
    "INK",
    "METRIC_TITLES",
    "caption",
    "house_style",
    "kind_label",
    "names_of",
    "palette",
    "save",
    "short_number",
    "tidy",
]

# From Okabe & Ito 2008: distinguishable with all common forms of colour blindness, and in print.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, GREY, FAINT = "#222222", "#8A8A8A", "#E3E3E3"
_OTHERS = (PURPLE, ORANGE, SKY)

METRIC_TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "auprc_base_rate": "AUPRC at the base rate",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "f1_base_rate": "F1 at the base rate",
    "accuracy": "accuracy",
    "pearson": "Pearson r",
}
CHANCE = {"auroc": 0.5, "balanced_accuracy": 0.5, "pearson": 0.0}  # the other metrics have no fixed chance level

_RC: dict[Any, object] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.unicode_minus": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # keep text as text, not as outlines
    "svg.hashsalt": "evalkit",  # keep the ids of clip paths and markers the same in every file
    "path.simplify": False,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Apply the style to figures drawn and saved inside the block; afterwards restore matplotlib's settings."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def palette(sources: Sequence[Source]) -> dict[str, str]:
    """A colour for each kind: RQAE vermilion, SAE blue, planted green, other controls grey, other kinds in turn."""
    colours = {"rqae": VERMILION, "sae": BLUE, "null-planted": GREEN}
    for kind in sorted({source.kind for source in sources}):
        if kind.startswith(CONTROL_KIND):
            colours.setdefault(kind, GREY)
    others = sorted({source.kind for source in sources} - set(colours))
    return colours | {kind: _OTHERS[place % len(_OTHERS)] for place, kind in enumerate(others)}


def kind_label(kind: str) -> str:
    """The kind as a label: "SAE" and "RQAE" in capitals, other kinds unchanged."""
    return kind.upper() if kind in {"sae", "rqae"} else kind


def short_number(value: float) -> str:
    """1024 → 1k, 16384 → 16k, 1048576 → 1M, 31.2 → 31, 24576 → 24k; if not a multiple of 1024: 5000 → 5k."""
    for unit, name in ((1024**2, "M"), (1000**2, "M"), (1024, "k"), (1000, "k")):
        if value >= unit and value % unit == 0:
            return f"{value / unit:.0f}{name}"
    if value >= 1000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def names_of(sources: Sequence[Source]) -> dict[str, str]:
    """A short label for each dictionary: "RQAE 64", "SAE 2k · L0 33", "random directions"; if not unique, its name."""
    sites = {source.site for source in sources}
    labels = {source.name: _label(source, several_sites=len(sites) > 1) for source in sources}
    taken = list(labels.values())
    return {name: label if taken.count(label) == 1 else name for name, label in labels.items()}


def _label(source: Source, *, several_sites: bool) -> str:
    if source.is_null:
        label = source.kind.removeprefix(CONTROL_KIND).replace("-", " ")
    elif source.depth is not None:
        label = f"{kind_label(source.kind)} {source.depth}"
    else:
        sizes = [short_number(source.width)] if source.width else []
        sizes += [f"· L0 {short_number(source.l0)}"] if source.l0 else []
        label = " ".join([kind_label(source.kind), *sizes]) if sizes else source.name
    return f"{label} @ {source.site.rsplit('/', 1)[-1]}" if several_sites else label


def tidy(axes: Axes) -> None:
    """Removes the top and right border and draws the grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def caption(figure: Figure, text: str) -> None:
    """Adds wrapped text at the bottom left."""
    width = int(figure.get_size_inches()[0] * 16.5)
    figure.supxlabel("\n".join(textwrap.wrap(text, width)), x=0.01, ha="left", fontsize=7.5, color="#555555")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name``.png (200 dots per inch) and ``name``.svg. The same figure gives the same bytes.

    Raises StorageError if the folder cannot be written.
    """
    figure.draw_without_rendering()  # compute the layout once, for both files
    figure.set_layout_engine("none")
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=200, facecolor="white", metadata=metadata)
        path = folder / f"{name}.{kind}"
        _write(path, buffer.getvalue())
        paths.append(path)
    return paths


def _write(path: Path, data: bytes) -> None:
    """Replace the file in one step, so that a reader sees either the old or the new file."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, raw = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(raw)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StorageError(
            str(path),
            expected="a folder that can be written",
            seen=error.strerror or str(error),
            fix="free space or choose another folder",
        ) from error
