"""Recorded answers, token prices and the limits on calls and cost."""
