"""``evalkit doctor``: reports what is installed and reachable, and prints the commands that fix the rest."""

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
_HEADINGS = {"broken": "to fix", "missing": "optional parts that are missing", "note": "only if you need it"}
_COMMANDS = {"evalkit", "export", "mv", "pip"}


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command(rich_help_panel="Inspect and check")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    client: Annotated[
        str | None,
        typer.Option(help="Client to test with one short request: NAME:VALUE, e.g. openai:MODEL or vllm:MODEL."),
    ] = None,
    base_url: Annotated[
        list[str] | None, typer.Option(help="Server for the test request; repeat for several, each gets one.")
    ] = None,
    client_option: Annotated[
        list[str] | None, typer.Option(help="Option of the client, as KEY=VALUE; repeat for several.")
    ] = None,
) -> None:
    """List installed packages, models, devices and keys, and the commands that install or fix the rest.

    With --client, also test whether that model answers. The exit code is 1 if something is broken or does not answer; a
    missing optional part is not a failure. The report says whether a key is set and never shows the key.

    Example: `evalkit doctor --client openai:my-model --base-url http://localhost:8000/v1`
    """
    from evalkit.doctor.checks import diagnose, is_well

    if client is None and (base_url or client_option):
        option = "--base-url" if base_url else "--client-option"
        raise BadConfig(option, expected="a client that uses it", seen="no --client", fix="add --client NAME:VALUE")
    if client is not None:
        name = client.partition(":")[0]
        STDERR.print(f"sending a test request to {name}; an engine takes a while to start", highlight=False)
    with contextlib.redirect_stdout(sys.stderr):  # output of plug-ins and engines is not part of the report
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
    """Prints unwrapped lines to copy into a shell; a fix that is not a command is printed as a comment."""
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
