"""``evalkit table`` and ``evalkit plot``: results from the records alone, without torch or a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

Run = Annotated[Path, typer.Argument(help="Run folder.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(rich_help_panel="Results")(table)
    app.command(rich_help_panel="Results")(plot)


def table(
    run: Run,
    format: Annotated[str, typer.Option("--format", "-f", help="markdown, csv, json, latex or parquet.")] = "markdown",
    out: Annotated[Path | None, typer.Option(help="File to write instead of stdout.")] = None,
    short: Annotated[bool, typer.Option("--short", help="AUROC and balanced accuracy only, as mean ± SE.")] = False,
) -> None:
    """Print the scores of a run, one row per dictionary, scorer, explainer, judge and metric, with standard errors.

    Example: `evalkit table runs/demo --format csv > demo.csv`
    """
    from evalkit.files import write_bytes
    from evalkit.report.render import render
    from evalkit.report.tables import footer, headline, summary_table
    from evalkit.store import read_run

    frames = read_run(run)
    summary = summary_table(frames)
    rendered = render(headline(summary) if short else summary, format, footer(frames, summary))
    data = rendered.encode() if isinstance(rendered, str) else rendered
    if out is not None:
        write_bytes(out, data)
    else:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()


def plot(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="Folder of the figures; default: RUN/plots.")] = None,
    metric: Annotated[str, typer.Option(help="auroc, balanced_accuracy, f1 or auprc.")] = "auroc",
) -> None:
    """Draw the scores of a run against L0 and width, and their distributions over features; prints the files' paths.

    Example: `evalkit plot runs/demo --metric balanced_accuracy`
    """
    from evalkit.report.plots import plot_run
    from evalkit.store import read_run

    for path in plot_run(read_run(run), out or run / "plots", metric=metric):
        sys.stdout.write(f"{path}\n")
