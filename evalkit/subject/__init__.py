"""The subject model: finds, loads and reads it, and names its sites."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.subject.model import Subject as Subject

__all__ = ["Subject"]


def __getattr__(name: str) -> Any:
    """Load the module behind a public name on first use: it imports torch, which reading results does not need."""
    if name in __all__:
        return getattr(importlib.import_module("evalkit.subject.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
