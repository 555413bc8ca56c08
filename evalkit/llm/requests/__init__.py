"""Requests to a language model, the names of clients, and chat templates."""
