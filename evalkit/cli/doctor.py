"""``evalkit doctor``: what is installed and reachable, and the commands that mend the rest."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from evalkit.cli.console import STDERR
from evalkit.errors import BadConfig

if TYPE_CHECKING:
    from evalkit.doctor.checks import Finding

__all__ = ["register"]

_STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red", "note": "cyan"}
_HEADINGS = {"broken": "to mend", "missing": "to add what is missing, if you want it", "note": "if you need it"}
_COMMANDS = {"evalkit", "export", "mv", "pip"}


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command(rich_help_panel="Look around")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    client: Annotated[
        str | None, typer.Option(help="Client to ask one tiny question: NAME:VALUE, e.g. openai:MODEL or vllm:MODEL.")
    ] = None,
    base_url: Annotated[
        list[str] | None, typer.Option(help="Server that the client asks; repeat for several, each is asked.")
    ] = None,
    client_option: Annotated[
        list[str] | None, typer.Option(help="Further option of the client, as KEY=VALUE; repeat for several.")
    ] = None,
) -> None:
    """Say what is installed, which models, devices and keys there are, and how to get what is missing.

    With --client, also whether that model answers. Ends with 1 if something is broken or does not answer; an optional
    part that is missing is no failure. Of keys it says only whether they are set.

    Example: `evalkit doctor --client openai:my-model --base-url http://localhost:8000/v1`
    """
    from evalkit.doctor.checks import diagnose, is_well

    if client is None and (base_url or client_option):
        option = "--base-url" if base_url else "--client-option"
        raise BadConfig(option, expected="a client to use it", seen="no --client", fix="add --client NAME:VALUE")
    if client is not None:
        STDERR.print(f"asking {client.partition(':')[0]}; an engine takes a while to start", highlight=False)
    with contextlib.redirect_stdout(sys.stderr):  # what plug-ins and engines print is no part of the report
        findings = diagnose(client, base_urls=base_url or (), client_options=client_option or ())
    if as_json:
        from dataclasses import asdict

        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        _print_table(findings)
        _print_fixes(findings)
    if not is_well(findings):
        raise typer.Exit(1)


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "name", "state", "detail", box=None)
    group = ""
    for finding in findings:
        shown = finding.group if finding.group != group else ""
        if shown and group:
            table.add_row()
        group = finding.group
        state = Text(finding.state, style=_STYLES[finding.state])
        table.add_row(Text(shown, style="bold"), Text(finding.name), state, Text(finding.detail, overflow="fold"))
    Console().print(table)


def _print_fixes(findings: list[Finding]) -> None:
    """Lines to copy into a shell, none of them wrapped; advice that is no command stands as a comment."""
    seen: set[str] = set()
    for state, heading in _HEADINGS.items():
        lines = []
        for finding in findings:
            if finding.state != state or not finding.fix or finding.fix in seen:
                continue
            seen.add(finding.fix)
            fix = finding.fix.replace("\n", " ")
            if fix.split()[0] not in _COMMANDS:
                fix = f"# {finding.name}: {fix}"
            lines.append(fix if "#" in fix else f"{fix}  # {finding.name}")
        if lines:
            sys.stdout.write("\n".join(["", f"# {heading}", *lines, ""]))
