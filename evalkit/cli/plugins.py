"""``evalkit plugins``: lists everything that the registry knows."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command(rich_help_panel="Inspect and check")(plugins)


def plugins(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List explainers, judges, scorers, sources and clients, and the package that provides each of them.

    Example: `evalkit plugins --json`
    """
    from dataclasses import asdict

    from evalkit.registry import list_plugins

    found = list_plugins()
    if as_json:
        sys.stdout.write(json.dumps([asdict(plugin) for plugin in found], indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "name", "origin", "abilities", "state", box=None)
    for plugin in found:
        table.add_row(plugin.kind, plugin.name, plugin.origin, ", ".join(plugin.abilities), plugin.error or "ready")
    Console().print(table)
