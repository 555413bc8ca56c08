"""Feature sources: finding dictionaries and opening them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.sources.opening import BUNDLED as BUNDLED
    from evalkit.sources.opening import load_source as load_source
    from evalkit.sources.opening import open_dictionaries as open_dictionaries
    from evalkit.sources.opening import open_dictionary as open_dictionary

__all__ = ["BUNDLED", "load_source", "open_dictionaries", "open_dictionary"]


def __getattr__(name: str) -> Any:
    """Import ``opening`` on first use of a public name: it needs torch, and code that only reads results does not."""
    if name in __all__:
        return getattr(importlib.import_module("evalkit.sources.opening"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
