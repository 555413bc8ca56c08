"""``evalkit inspect``: what a dictionary is like, measured."""
