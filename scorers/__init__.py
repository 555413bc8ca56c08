"""Scorers: each builds a test of an explanation, asks a judge and holds the answers against the labels. One file each."""
