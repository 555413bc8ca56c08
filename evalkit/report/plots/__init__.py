"""Figures of finished runs, and the style of all figures."""
