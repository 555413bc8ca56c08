"""Table lines for the inspection of all dictionaries except RQAEs.

Formats the columns of the parts; measures nothing. Reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

__all__ = ["LINES", "TITLES", "about_lines"]

TITLES = {
    "fit": "Reconstruction",
    "density": "How often features fire",
    "geometry": "Nearest neighbours",
    "loss": "Next-token loss",
}
MISSING = "–"
Row: TypeAlias = Mapping[str, Any]
Lines: TypeAlias = list[dict[str, str]]


def about_lines(about: Row) -> Lines:
    """Facts about the whole dictionary, one per line."""
    site = str(about["site"])
    if not site.endswith(f"/{about['reconstructs']}"):
        site += f" → {about['reconstructs']}"
    facts = {**about, "site": site}
    return [{"": title, "value": write(facts[key])} for key, (title, write) in _FACTS.items() if key in facts]


def _shape(value: Sequence[int]) -> str:
    return " × ".join(map(str, value))


def _fit(rows: Sequence[Row]) -> Lines:
    row = rows[0]
    measures = {
        "L0": (row["l0"], row["l0_declared"], ".2f"),
        "FVU": (row["fvu"], row["fvu_declared"], ".4f"),
        "cosine": (row["cosine"], None, ".4f"),
        "norm ratio": (row["norm_ratio"], None, ".4f"),
        "best rescaling": (row["rescale"], None, ".4f"),
        "FVU rescaled": (row["fvu_rescaled"], None, ".4f"),
        "alive": (row["alive_share"], row["alive_declared"], ".1%"),
    }
    return [
        {"": name, "measured": _number(measured, form), "declared": _number(declared, form)}
        for name, (measured, declared, form) in measures.items()
    ]


def _density(rows: Sequence[Row]) -> Lines:
    return [
        {"log10 rate": _bin(row), "latents": f"{row['latents']:,}", "share": f"{row['share']:.1%}"}
        for row in rows
        if row["latents"] or row["low"] is None
    ]


def _bin(row: Row) -> str:
    return "never" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"


def _geometry(rows: Sequence[Row]) -> Lines:
    return [
        {
            "statistic": row["statistic"],
            "measured": _measured(row["value"]),
            "random": _measured(row["random"]),
            "latents": ", ".join(map(str, row["latents"])),
        }
        for row in rows
    ]


def _measured(value: float | int | None) -> str:
    return f"{value:,}" if isinstance(value, int) else _number(value, ".4f")


def _loss(rows: Sequence[Row]) -> Lines:
    return [
        {
            "states": row["states"],
            "loss": _number(row["loss"], ".4f"),
            "loss change": _change(row),
            "recovered (zero)": _number(row["recovered_zero"], ".4f"),
            "recovered (mean)": _number(row["recovered_mean"], ".4f"),
        }
        for row in rows
    ]


def _change(row: Row) -> str:
    shown = _number(row["loss_change"], "+.4f")
    return f"{shown} ± {row['se']:.4f}" if row["se"] else shown


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


_FACTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "format": ("format", str),
    "kind": ("kind", str),
    "site": ("site", str),
    "width": ("width", lambda value: f"{value:,}"),
    "activation": ("activation", str),
    "active": ("active", str),
    "transform": ("input transform", str),
    "w_enc": ("W_enc", _shape),
    "w_dec": ("W_dec", _shape),
    "vectors": ("vectors", _shape),
    "l0": ("L0", lambda value: _number(value, ".1f")),
    "fvu": ("FVU", lambda value: _number(value, ".4f")),
}
LINES: dict[str, Callable[[Sequence[Row]], Lines]] = {
    "fit": _fit,
    "density": _density,
    "geometry": _geometry,
    "loss": _loss,
}
