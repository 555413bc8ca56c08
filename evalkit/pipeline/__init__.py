"""A whole run: the order of its stages, and an estimate of its time and cost."""
