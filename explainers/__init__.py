"""Explainers: each writes a description of a feature from examples of the explain pool. One file each."""
