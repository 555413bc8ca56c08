"""Clients, one module per way of reaching a language model."""
