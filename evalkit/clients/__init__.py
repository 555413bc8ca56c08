"""Clients: each reaches a language model, or the recorded answers of one. One file each."""
