"""How long work tells its caller how far it is; by default it tells nobody."""

from __future__ import annotations

from typing import Protocol

__all__ = ["SILENT", "Progress"]


class Progress(Protocol):
    """Draws bars, or whatever the caller likes."""

    def start(self, description: str, total: int | None, unit: str) -> int:
        """Open a task; returns its id."""

    def advance(self, task: int, amount: int = 1) -> None:
        """``amount`` more units are done."""

    def finish(self, task: int) -> None:
        """The task is done."""


class _Silent:
    """Reports nothing."""

    def start(self, description: str, total: int | None, unit: str) -> int:
        return 0

    def advance(self, task: int, amount: int = 1) -> None:
        return None

    def finish(self, task: int) -> None:
        return None


SILENT: Progress = _Silent()
