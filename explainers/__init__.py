"""Explainers, one file each. An explainer writes a description of a feature from examples of the explain pool."""
