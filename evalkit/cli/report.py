"""``evalkit table``, ``compare`` and ``plot``: results from a run's records, without torch or a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["register"]

Run = Annotated[Path, typer.Argument(help="Run folder.")]
Format = Annotated[str, typer.Option("--format", "-f", help="Output format: markdown, csv, json, latex or parquet.")]
File = Annotated[Path | None, typer.Option(help="Write to this file instead of stdout.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(rich_help_panel="Results")(table)
    app.command(rich_help_panel="Results")(compare)
    app.command(rich_help_panel="Results")(plot)


def table(
    run: Run,
    format: Format = "markdown",
    out: File = None,
    short: Annotated[
        bool,
        typer.Option(
            "--short", help="Print one line per dictionary and scorer: AUROC and balanced accuracy as mean ± SE."
        ),
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="balanced_accuracy, f1, auroc, auprc, f1_base_rate, auprc_base_rate or accuracy; repeat for several. "
            "Default: the first four. The _base_rate metrics weight positives by the feature's frequency in the corpus."
        ),
    ] = None,
    by: Annotated[str | None, typer.Option(help="decile: one row per activation decile of the positives.")] = None,
) -> None:
    """Print the scores of a run, one row per dictionary, scorer, explainer, judge and metric, with standard errors.

    Example: `evalkit table runs/demo --format csv > demo.csv`
    """
    from evalkit.errors import BadConfig
    from evalkit.report.footer import footer
    from evalkit.report.tables import headline, headline_rows, summary_table
    from evalkit.store.run_store import read_run

    if by not in (None, "decile"):
        raise BadConfig("--by", expected="decile", seen=repr(by), fix="use --by decile, or leave it out")
    frames = read_run(run)
    if by == "decile":
        from evalkit.report.deciles import decile_notes, decile_table

        _print(decile_table(frames, tuple(metric or ("auroc",))), format, decile_notes(), out)
        return
    summary = summary_table(frames, tuple(metric) if metric else None)
    if short:
        _print(headline(summary), format, footer(frames, headline_rows(summary)), out)
    else:
        _print(summary, format, footer(frames, summary), out)


def compare(
    run: Run,
    metric: Annotated[str, typer.Option(help="Metric to compare, as for `evalkit table --metric`.")] = "auroc",
    between: Annotated[
        list[str] | None,
        typer.Option(help="Compare dictionaries, explainers or judges; repeat for several. Default: all three."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Name of a dictionary, explainer or judge: show only pairs with it, as the second of the pair."
        ),
    ] = None,
    controls: Annotated[bool, typer.Option("--controls", help="Include control dictionaries.")] = False,
    format: Format = "markdown",
    out: File = None,
) -> None:
    """Print the differences between a run's dictionaries, explainers and judges, with standard errors and p-values.

    Differences are paired if both sides have the same features; otherwise the test is Welch's. Holm's correction covers all
    rows of the printed table.

    Example: `evalkit compare runs/demo --metric auroc --between dictionaries`
    """
    from evalkit.report.compare import BETWEEN, compare_notes, compare_rows
    from evalkit.store.run_store import read_run

    found = compare_rows(
        read_run(run), metric, between=tuple(between) if between else BETWEEN, baseline=baseline, controls=controls
    )
    _print(found, format, compare_notes(found), out)


def _print(table: Any, format: str, notes: Sequence[str], out: Path | None) -> None:
    from evalkit.report.render import render
    from evalkit.util.atomic_files import write_bytes

    rendered = render(table, format, notes)
    data = rendered.encode() if isinstance(rendered, str) else rendered
    if out is not None:
        write_bytes(out, data)
    else:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()


def plot(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures; default: RUN/plots.")] = None,
    metric: Annotated[str, typer.Option(help="Metric to plot: auroc, balanced_accuracy, f1 or auprc.")] = "auroc",
) -> None:
    """Draw the scores of a run against L0 and width, and their distributions over features; print the files' paths.

    Example: `evalkit plot runs/demo --metric balanced_accuracy`
    """
    from evalkit.report.plots.files import plot_run
    from evalkit.store.run_store import read_run

    for path in plot_run(read_run(run), out or run / "plots", metric=metric):
        sys.stdout.write(f"{path}\n")
