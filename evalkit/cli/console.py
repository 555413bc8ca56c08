"""The terminal: one console on stderr and its progress bars. Knows nothing of evaluation."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from evalkit.protocols import Progress as ProgressReporter
from evalkit.util.progress import SILENT

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["STDERR", "progress_bars"]

STDERR = Console(stderr=True)


class _Bars:
    """Rich bars with elapsed and remaining time; if stderr is not a terminal, plain lines every half minute."""

    PERIOD_S = 30.0

    def __init__(self, bars: Progress, *, plain: bool) -> None:
        self._bars = bars
        self._plain = plain
        self._last: dict[int, float] = {}

    def start(self, description: str, total: int | None, unit: str) -> int:
        task = self._bars.add_task(description, total=total, unit=unit)
        self._last[task] = time.monotonic()
        if self._plain:
            STDERR.print(f"{description}: {total if total is not None else '?'} {unit}", highlight=False)
        return int(task)

    def advance(self, task: int, amount: int = 1) -> None:
        self._bars.advance(task, amount)  # type: ignore[arg-type]
        if self._plain and time.monotonic() - self._last[task] > self.PERIOD_S:
            self._last[task] = time.monotonic()
            one = next(found for found in self._bars.tasks if found.id == task)
            left = f"{one.time_remaining:.0f} s left" if one.time_remaining is not None else "time left unknown"
            done = f"{one.completed:,.0f} of {one.total or 0:,.0f} {one.fields['unit']}"
            STDERR.print(f"{one.description}: {done}, {left}", highlight=False)

    def finish(self, task: int) -> None:
        one = next(found for found in self._bars.tasks if found.id == task)
        self._bars.update(one.id, total=one.completed)
        if self._plain:
            STDERR.print(f"{one.description}: done in {one.elapsed or 0:.0f} s", highlight=False)


@contextlib.contextmanager
def progress_bars() -> Iterator[ProgressReporter]:
    """Shows progress bars while the block runs, unless --quiet is given. On Ctrl-C, prints how to resume."""
    try:
        with _bars() as reporter:
            yield reporter
    except KeyboardInterrupt:
        told = "stopped; finished work is kept; run the same command to resume"
        sys.stderr.write(f"\n{told}:\n  {_command()}\n")
        raise


def _command() -> str:
    """The command line that started this process, quoted for a shell in the same folder."""
    program = Path(sys.argv[0])
    called = [program.name if shutil.which(program.name) == str(program) else str(program)]
    if program.name == "__main__.py":
        called = [sys.orig_argv[0], "-m", program.parent.name]
    return shlex.join([*called, *sys.argv[1:]])


@contextlib.contextmanager
def _bars() -> Iterator[ProgressReporter]:
    if STDERR.quiet:
        yield SILENT
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    plain = not sys.stderr.isatty()
    bars = Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=STDERR,
        disable=plain,
    )
    with bars:
        yield _Bars(bars, plain=plain)
