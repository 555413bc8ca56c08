"""Measurements of an SAE."""
