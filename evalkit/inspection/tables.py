"""Renders an inspection as text: markdown with one table per part, csv with one table for all parts, or one JSON object.

Formats the columns of the parts; measures nothing. Reads and writes no files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd

from evalkit.errors import BadConfig
from evalkit.inspection.parts.cache import Part
from evalkit.inspection.sae import tables as sae_tables
from evalkit.report.render import render

__all__ = ["FORMATS", "TITLES", "check_format", "render_inspection"]

FORMATS = ("markdown", "csv", "json")
TITLES = {
    "prefixes": "Unique code prefixes",
    "cosines": "Cosines between decoded codes",
    "layers": "Layer weights",
    "fit": "Reconstruction and next-token loss",
    "ranks": "Spearman: rank of intensity with rank of cosine",
    "sae": "Pearson: SAE latents with features made from them",
}
MISSING = "–"
Row: TypeAlias = Mapping[str, Any]


def check_format(format: str) -> str:
    """Returns the format. Raises BadConfig if it is not one of FORMATS."""
    if format not in FORMATS:
        raise BadConfig("format", expected=f"one of {', '.join(FORMATS)}", seen=repr(format), fix=f"use {FORMATS[0]!r}")
    return format


def render_inspection(about: Mapping[str, Any], parts: list[Part], format: str = "markdown") -> str:
    """The parts in one of FORMATS, ending in a newline. Raises BadConfig for any other format.

    markdown: rounded, with notes; of the layer weights, only some quantizers.
    csv: one table with the columns of all parts and a first column ``part``; full precision, every row.
    json: the facts of ``about``, and the rows of each part under ``parts``; full precision, every row.

    For dictionaries other than RQAEs, ``about`` is also shown in markdown (as a table) and csv (as the part ``about``).
    """
    is_sae = about["kind"] != "rqae"
    match check_format(format):
        case "csv":
            named: list[tuple[str, list[dict[str, Any]]]] = [("about", [dict(about)])] if is_sae else []
            named += [(part.name, part.rows) for part in parts]
            frames = [pd.DataFrame([{"part": name, **row} for row in rows]) for name, rows in named]
            return str(render(pd.concat(frames, ignore_index=True), "csv"))
        case "json":
            whole = {**about, "parts": {part.name: part.rows for part in parts}}
            return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
        case _ if is_sae:
            first = _table(sae_tables.about_lines(about))
            blocks = [
                f"## {sae_tables.TITLES[part.name]}\n\n{_table(sae_tables.LINES[part.name](part.rows), part.notes)}"
                for part in parts
            ]
            return "\n".join([f"# {about['name']}\n", first, *blocks])
        case _:
            blocks = [f"## {TITLES[part.name]}\n\n{_markdown(part)}" for part in parts]
            return "\n".join([f"# {about['name']}\n", *blocks])


def _markdown(part: Part) -> str:
    if part.name == "sae":
        lines = _matches(part.rows)
    else:
        rows = [row for row in part.rows if part.name != "layers" or _shown(row["quantizer"], len(part.rows))]
        lines = [{title: write(row) for title, write in _COLUMNS[part.name].items()} for row in rows]
    return _table(lines, part.notes)


def _table(lines: list[dict[str, str]], notes: Sequence[str] = ()) -> str:
    return str(render(pd.DataFrame(lines, dtype=str), "markdown", notes))


def _matches(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One line per depth, with a column for each pair of a way of making features and a set of examples."""
    lines: dict[int, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(row["depth"], {"depth": str(row["depth"])})
        line[f"{row['made_from']}, {row['examples']}"] = _with_error(3)(row)
    return list(lines.values())


def _shown(quantizer: int, count: int) -> bool:
    """Whether markdown shows this quantizer: powers of two and the last one."""
    return quantizer & (quantizer - 1) == 0 or quantizer == count


def _of(name: str, form: str) -> Callable[[Row], str]:
    return lambda row: MISSING if row[name] is None else format(row[name], form)


def _with_error(digits: int, mean: str = "mean", error: str = "se") -> Callable[[Row], str]:
    def write(row: Row) -> str:
        if row[mean] is None:
            return MISSING
        shown = f"{row[mean]:.{digits}f}"
        return shown if row[error] is None else f"{shown} ± {row[error]:.{digits}f}"

    return write


def _sampled(row: Row) -> str:
    return f"{row['sampled']:,}" if row["sampled"] else "exact"


_COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "prefixes": {
        "depth": _of("depth", "d"),
        "prefixes": _of("prefixes", ",d"),
        "tokens per prefix": _of("tokens_per_prefix", ",.2f"),
        "alone": _of("alone", ".1%"),
    },
    "cosines": {
        "pairs": lambda row: str(row["kind"]),
        "number": lambda row: f"{row['pairs']:,}" if row["pairs"] else MISSING,
        "measured": _sampled,
        "small": _of("small", ".2%"),
        "mean": _of("mean", ".4f"),
    },
    "layers": {
        "quantizer": _of("quantizer", "d"),
        "weight": _of("weight", ".4f"),
        "cumulative": _of("cumulative", ".1%"),
    },
    "fit": {
        "depth": _of("depth", "d"),
        "FVU": _of("fvu", ".4f"),
        "FVU normed": _of("fvu_normed", ".4f"),
        "loss change": _with_error(4, "loss_change"),
        "recovered (zero)": _of("recovered_zero", ".4f"),
        "recovered (mean)": _of("recovered_mean", ".4f"),
    },
    "ranks": {
        "depth": _of("depth", "d"),
        "Spearman": _with_error(3),
        "features": lambda row: f"{row['features']}/{row['tried']}",
    },
}
