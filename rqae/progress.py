"""The interface through which long computations report their progress. The default implementation reports nothing."""

from __future__ import annotations

from typing import Protocol

__all__ = ["SILENT", "Progress"]


class Progress(Protocol):
    """Receives progress, for example to draw bars."""

    def start(self, description: str, total: int | None, unit: str) -> int:
        """Open a task; returns its id."""

    def advance(self, task: int, amount: int = 1) -> None:
        """Report ``amount`` more finished units."""

    def finish(self, task: int) -> None:
        """Close the task."""


class _Silent:
    """Reports nothing."""

    def start(self, description: str, total: int | None, unit: str) -> int:
        return 0

    def advance(self, task: int, amount: int = 1) -> None:
        return None

    def finish(self, task: int) -> None:
        return None


SILENT: Progress = _Silent()
