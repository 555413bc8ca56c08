"""An event loop whose clock jumps: where everybody waits, the time for which the first one waits is over at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Jumping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Never waits; adds up what it would have waited."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("everybody waits, and nothing will ever happen")
        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time`` is in seconds from 1000; it stands still while code runs."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.now


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """What the coroutine returns, however long it would have waited."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
