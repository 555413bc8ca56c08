"""The only error of the RQAE package. Its message says what was expected, what was seen, and how to fix it.

The evaluation harness converts it into its own errors; this package does not import the harness.
"""

from __future__ import annotations

__all__ = ["RqaeError"]


class RqaeError(ValueError):
    """An invalid file, tensor or option; ``subject`` names it."""

    def __init__(self, subject: str, *, expected: str, seen: str, fix: str) -> None:
        self.subject, self.expected, self.seen, self.fix = subject, expected, seen, fix
        super().__init__(f"{subject}: expected {expected}; seen {seen}; fix: {fix}")
