"""Codes of a corpus on disk, and the tokens that match a feature best."""

from __future__ import annotations

from rqae.searching.code_store import CodeStore
from rqae.searching.scan import Hits, activity_thresholds, search

__all__ = ["CodeStore", "Hits", "activity_thresholds", "search"]
