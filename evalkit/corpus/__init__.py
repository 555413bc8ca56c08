"""The corpus: reads text, cuts it into contexts and windows, and finds the text of single tokens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.corpus.contexts import Corpus as Corpus
    from evalkit.corpus.tokenisation import tokenize_corpus as tokenize_corpus

__all__ = ["Corpus", "tokenize_corpus"]


def __getattr__(name: str) -> Any:
    """Load the module behind a public name on first use, so that importing the package stays cheap."""
    if name in __all__:
        module = "tokenisation" if name == "tokenize_corpus" else "contexts"
        return getattr(importlib.import_module(f"evalkit.corpus.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
