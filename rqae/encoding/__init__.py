"""Codes of vectors: the literal definition, and the fast kernels that equal it."""
