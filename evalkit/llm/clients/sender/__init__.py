"""Runs a client in its own process, so that answers are recorded even if the command that sent the requests is killed."""
