"""Storage of a corpus's codes on disk, and search for the tokens with the highest intensity of a feature."""

from __future__ import annotations

from rqae.searching.code_store import CodeStore
from rqae.searching.scan import Hits, activity_thresholds, search

__all__ = ["CodeStore", "Hits", "activity_thresholds", "search"]
