"""A run folder on disk: its configuration, its lock, and writing and reading its records."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.store.run_store import RunStore as RunStore
    from evalkit.store.run_store import read_run as read_run

__all__ = ["RunStore", "read_run"]


def __getattr__(name: str) -> Any:
    """Load the module behind a public name on first use, so that importing the package stays cheap."""
    if name in __all__:
        return getattr(importlib.import_module("evalkit.store.run_store"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
