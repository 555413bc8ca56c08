"""Judges: each decides how well an explanation matches a text, without access to the label. One file each."""
