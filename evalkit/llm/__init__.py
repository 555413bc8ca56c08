"""Asking a language model: clients, recorded answers, limits on what is spent."""
