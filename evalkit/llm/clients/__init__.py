"""Clients: one module per way to query a language model."""
