"""Prints the plan and cost estimate of a run (``--dry-run``), and after a run its usage next to the estimate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from evalkit.cli.console import STDERR

__all__ = ["print_plan", "print_spending"]


def print_plan(config: Any, folder: Path, *, as_json: bool) -> None:
    """Prints the plan on stdout, as JSON or as tables."""
    from evalkit.pipeline.plan import plan

    planned = plan(config, folder)
    if as_json:
        sys.stdout.write(json.dumps(planned, indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    facts = Table(box=None, show_header=False)
    for name in planned["dictionaries"]:
        facts.add_row("dictionary", name)
    facts.add_row("controls", ", ".join(planned["controls"]) or "none")
    for name in ("features", "explanations", "judgements"):
        facts.add_row(name, f"{planned[name]:,} at most")
    reading = planned["reading"]
    if reading["tokens"]:
        about = (
            ""
            if reading["seconds"] is None
            else f", about {_duration(reading['seconds'])} to read (within a factor of two)"
        )
        facts.add_row("corpus", f"{reading['tokens']:,} tokens{about}")
    console = Console(width=max(Console().width, 100))
    console.print(facts)
    asking = planned["language_model"]
    if asking is None:
        console.print("No language model is used.")
        return
    parts = Table("requests to " + asking["model"], "calls", "prompt tokens", box=None)
    for name, part in asking["parts"].items():
        parts.add_row(name, f"{part['calls']:,}", f"{part['prompt_tokens']:,}")
    console.print()
    console.print(parts)
    console.print(f"\n{_sentence(asking)} Estimated from {asking['basis']}.", highlight=False)


def _sentence(asking: dict[str, Any]) -> str:
    cost = "no price given (--prices)" if asking["cost_usd"] is None else f"${asking['cost_usd']:,.4f}"
    if asking["batches"] is None:
        time = f"about {_duration(asking['seconds'])} at {asking['seconds_per_call']:g} s per call"
    else:
        waves, window = asking["batches"]["waves"], asking["batches"]["window"]
        time = f"in {waves} {'wave' if waves == 1 else 'waves'} of batches, each answered within {window}"
    return (
        f"{asking['calls']:,} calls ({asking['recorded_calls']:,} of them already recorded), "
        f"{asking['prompt_tokens']:,} prompt and {asking['completion_tokens']:,} completion tokens to pay for, {cost}, "
        f"{time}."
    )


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def print_spending(folder: Path) -> None:
    """Prints a run's language-model usage, next to the estimate made by its first command, on stderr."""
    from evalkit.store.run_store import RunStore

    with RunStore.open(folder) as store:
        for asked in store.asked():
            STDERR.print(asked.sentence(), highlight=False)
