"""Readers of ready examples: exports and caches of other tools."""
