"""Judges: each says how well an explanation matches a text, never knowing the label. One file each."""
