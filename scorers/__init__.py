"""Scorers, one file each. A scorer builds a test of an explanation, queries a judge, and compares answers with labels."""
