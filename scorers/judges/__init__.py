"""Judges, one file each. A judge decides how well an explanation matches a text, without access to the label."""
