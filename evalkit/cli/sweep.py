"""``evalkit sweep``: a whole comparison, described in one file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from evalkit.cli.console import STDERR, progress_bars
from evalkit.cli.options import AsJson, DryRun, Force
from evalkit.cli.plan import print_plan, print_spending

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command(rich_help_panel="Score")(sweep)


def sweep(
    spec: Annotated[Path, typer.Argument(help="TOML file: model, dictionaries, corpus, features, judges, …")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder; an unfinished sweep is resumed. Default: runs/NAME-OF-SPEC.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Subject model; overrides the file.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Corpus; overrides the file.")] = None,
    client: Annotated[str | None, typer.Option(help="Client of the language model; overrides the file.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Contexts per forward pass; does not change the results.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Score the dictionaries of one file under the same protocol; print the table and draw the plots.

    Example: `evalkit sweep results/sweeps/gemma2_2b.toml --dry-run`
    """
    from evalkit.config.sweep_file import read_sweep

    config = read_sweep(
        spec, model=model, corpus=corpus, client=client, batch_size=batch_size, device=device, force=force or None
    )
    folder = out or Path("runs") / spec.stem
    if dry_run:
        print_plan(config, folder, as_json=as_json)
        return
    from evalkit.pipeline.stages import run
    from evalkit.report.footer import footer
    from evalkit.report.plots.files import plot_run
    from evalkit.report.render import render
    from evalkit.report.tables import headline, headline_rows, summary_table
    from evalkit.store.run_store import read_run
    from evalkit.util.atomic_files import write_bytes

    with progress_bars() as progress:
        run(config, folder, progress=progress)
    print_spending(folder)
    frames = read_run(folder)
    table = summary_table(frames)
    below = footer(frames, table)
    for format, name in (("markdown", "table.md"), ("csv", "table.csv")):
        rendered = render(table, format, below)
        write_bytes(folder / name, rendered.encode() if isinstance(rendered, str) else rendered)
    short = render(headline(table), "markdown", footer(frames, headline_rows(table)))
    sys.stdout.write(short if isinstance(short, str) else short.decode())
    sys.stdout.flush()
    paths = [path for path in plot_run(frames, folder / "plots") if path.suffix == ".png"]
    STDERR.print(f"figures: {', '.join(str(path) for path in paths)}", highlight=False)
    STDERR.print(f"done; to see the full table: evalkit table {shlex.quote(str(folder))}", highlight=False)
