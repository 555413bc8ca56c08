"""A whole run: the order of its stages, and what it will take."""
