"""``evalkit export``: writes a run's explanations and scores in the file format of another tool."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command(rich_help_panel="Results")(export)


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    format: Annotated[str, typer.Option("--format", "-f", help="Format of the files: delphi.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be empty or not exist.")],
    explainer: Annotated[
        str | None, typer.Option("--explainer", help="Explainer to export; needed if the run has several.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="Judge to export; needed if the run has several.")
    ] = None,
    controls: Annotated[bool, typer.Option("--with-controls", help="Also export control dictionaries.")] = False,
) -> None:
    """Write a run's explanations and scores in the format of another tool; print the folders.

    Example: `evalkit export runs/demo --format delphi --out exported --judge embedding`
    """
    from evalkit.delphi.export import export_delphi
    from evalkit.errors import BadConfig

    if format != "delphi":
        raise BadConfig("--format", expected="delphi", seen=repr(format), fix="use --format delphi")
    done = export_delphi(run, out, explainer=explainer, judge=judge, controls=controls)
    for name, count in (("explanations", done.n_explanations), ("scores", done.n_scores)):
        sys.stdout.write(f"{out / name}\t{count}\n")
