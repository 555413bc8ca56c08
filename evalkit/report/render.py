"""Renders a table as markdown, csv, json, latex or parquet.

Knows how to format numbers, but nothing of their meaning. Writes nothing to disk.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from evalkit.errors import BadConfig

__all__ = ["FORMATS", "render"]

FORMATS = ("markdown", "csv", "json", "latex", "parquet")
MISSING = "–"

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "∞": r"$\infty$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "θ": r"$\theta$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
} | {sign: f"\\{sign}" for sign in "&%$#_"}


def render(table: pd.DataFrame, format: str = "markdown", footer: Sequence[str] = ()) -> str | bytes:
    """The table in one of ``FORMATS``: bytes for parquet, otherwise text that ends in a newline.

    markdown, latex: rounded to three digits, missing values as a dash, followed by the footer lines.
    csv, parquet: full precision, no footer.
    json: a list of records in full precision; missing and infinite values are null; no footer.

    Raises BadConfig for any other format.
    """
    match format:
        case "markdown":
            return _markdown(table, footer)
        case "latex":
            return _latex(table, footer)
        case "csv":
            return str(table.to_csv(index=False, lineterminator="\n"))
        case "json":
            records = [{name: _plain(value) for name, value in row.items()} for row in table.to_dict("records")]
            return json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        case "parquet":
            buffer = io.BytesIO()
            table.to_parquet(buffer, index=False)
            return buffer.getvalue()
        case _:
            raise BadConfig(
                "format", expected=f"one of {', '.join(FORMATS)}", seen=repr(format), fix=f"use {FORMATS[0]!r}"
            )


def _plain(value: Any) -> Any:
    """The value for JSON: numpy scalars become Python numbers; NaN, NA and infinities become None."""
    if pd.isna(value):
        return None
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(column: object, value: Any) -> str:
    """A cell of a readable table: integers as they are, L0 and z with fewer digits, other numbers with three."""
    if pd.isna(value):
        return MISSING
    if not isinstance(value, float):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if column == "l0":
        return f"{value:.1f}".removesuffix(".0")
    return f"{value:.2f}" if column == "z" else f"{value:.3f}"


def _cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]], list[bool]]:
    """The header, the rows as text, and for each column whether it is numeric."""
    header = [str(name) for name in table.columns]
    rows = [[_cell(name, value) for name, value in row.items()] for row in table.to_dict("records")]
    return header, rows, [pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]


def _markdown(table: pd.DataFrame, footer: Sequence[str]) -> str:
    header, rows, numeric = _cells(table)
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(3, *(len(line[column]) for line in [header, *rows])) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + ":" if number else "-" * width for width, number in zip(widths, numeric, strict=True)]
    lines = [line(header), line(rule), *(line(row) for row in rows)]
    notes = [f"- {note}" for note in footer]
    return "\n".join([*lines, "", *notes] if notes else lines) + "\n"


def _latex(table: pd.DataFrame, footer: Sequence[str]) -> str:
    header, rows, numeric = _cells(table)
    lines = [r"\begin{tabular}{" + "".join("r" if number else "l" for number in numeric) + "}", r"\toprule"]
    lines.append(" & ".join(map(_escape, header)) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(map(_escape, row)) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [r"\par\smallskip{\footnotesize " + _escape(note) + r"\par}" for note in footer]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
