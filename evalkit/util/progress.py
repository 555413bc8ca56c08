"""A progress reporter that does nothing: the default of library functions. The command line has a real one."""

from __future__ import annotations

__all__ = ["SILENT", "Silent"]


class Silent:
    """Reports nothing."""

    def start(self, description: str, total: int | None, unit: str) -> int:
        return 0

    def advance(self, task: int, amount: int = 1) -> None:
        return None

    def finish(self, task: int) -> None:
        return None


SILENT = Silent()
