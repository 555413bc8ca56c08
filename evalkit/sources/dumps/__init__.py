"""Readers of ready examples in the exports and caches of other tools."""
