"""Querying a language model: clients, recorded answers, limits on spending."""
