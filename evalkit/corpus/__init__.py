"""Text: reading it, cutting it into contexts and windows, and the text of single tokens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.corpus.contexts import Corpus as Corpus
    from evalkit.corpus.contexts import tokenize_corpus as tokenize_corpus

__all__ = ["Corpus", "tokenize_corpus"]


def __getattr__(name: str) -> Any:
    """Loads the module behind a public name on first use: it needs torch, which readers of results do without."""
    if name in __all__:
        return getattr(importlib.import_module("evalkit.corpus.contexts"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
