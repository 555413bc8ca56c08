"""The one error of the RQAE package, worded as expected, seen, fix.

Knows nothing of the evaluation harness, which turns it into an error of its own.
"""

from __future__ import annotations

__all__ = ["RqaeError"]


class RqaeError(ValueError):
    """A file, tensor or option that is not what it should be. ``subject`` names it."""

    def __init__(self, subject: str, *, expected: str, seen: str, fix: str) -> None:
        self.subject, self.expected, self.seen, self.fix = subject, expected, seen, fix
        super().__init__(f"{subject}: expected {expected}; seen {seen}; fix: {fix}")
