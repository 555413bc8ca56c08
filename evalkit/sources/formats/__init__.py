"""Readers of dictionaries, one module per on-disk format."""
